// Fewer launches for the same work. schedule() brings products of the same activations, and their biases, next to each other in the plan; fuse() joins
// neighbouring launches of the program by the rows of one table, divides products along k, and lets the launches right behind one add its pieces up (rows
// of another table). Every tensor of the graph is written, so a host may read any, but for one that the same launch would have written over.
#pragma once
#include "program.h"

namespace ggml_tp {

/// Moves a MUL_MAT up behind an earlier one of the same input, and behind these what is added to them, where nothing in between touches what is read or
/// written.
void schedule(Plan& plan, const Graph& graph);

/// Joins neighbouring steps that one kernel can do, on all ranks alike. Function handles of joined launches are unset.
void fuse(std::vector<ProgramStep>& steps, const std::vector<Arch>& archs);

/// Adds to a product of experts with their weights the next of the sums over its slots, if `sum` is that and lies apart from the products.
bool take_sum(MulVecIdArgs& product, const BinaryArgs& sum);

}  // namespace ggml_tp
