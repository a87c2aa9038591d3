// The host's cgraph as immutable values: the only place that reads it. Everything after this works on Graph alone.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "abi/ops.h"
#include "memory.h"

namespace ggml_tp {

namespace abi {
class Host;
}

struct Tensor {
    int id = 0;
    std::string name;
    abi::Op op{};
    int sub = 0;  // abi::Unary or abi::Glu
    int type = 0;
    i64 ne[4], nb[4];
    i32 params[16] = {};
    int src[10];     // ids, -1: none
    int root = 0;    // id of the tensor that owns the bytes (itself, unless it is a view)
    i64 offset = 0;  // bytes from the root's first byte
    i64 bytes = 0;   // spanned
    u64 address = 0;
    Buffer* buffer = nullptr;                 // null: not ours (the size and type may still be read)
    Stored* stored = nullptr;                 // when its bytes lie in a stored tensor; offset then counts from that tensor's first byte
    bool is_node = false, is_output = false;  // output: the host reads it behind the graph

    Strided strided() const { return {{ne[0], ne[1], ne[2], ne[3]}, {nb[0], nb[1], nb[2], nb[3]}, offset, unit_bytes(), unit_elems()}; }
    /// Bytes of a block, whichever axis it lies along: of a transposed view nb[0] is a row's.
    i64 unit_bytes() const {
        const WeightFormat* format = find_weight_format(type);
        return format ? format->block_bytes : std::min({nb[0], nb[1], nb[2], nb[3]});
    }
    /// Elements of a block: what nb[0] is the stride of.
    i64 unit_elems() const {
        const WeightFormat* format = find_weight_format(type);
        return format ? format->block_elems : 1;
    }
    i64 elems() const { return ne[0] * ne[1] * ne[2] * ne[3]; }
    float param_f32(int i) const;
    bool is_view_op() const;
};

/// Whether they share bytes.
inline bool overlap(const Tensor& a, const Tensor& b) {
    return a.address < b.address + static_cast<u64>(b.bytes) && b.address < a.address + static_cast<u64>(a.bytes);
}

struct Graph {
    std::vector<Tensor> tensors;
    std::vector<int> nodes;  // ids, in the host's order, views and empty tensors left out

    std::string to_text() const;
};

/// Finds our Buffer behind a host buffer object; null when it is not ours.
using BufferOf = Buffer* (*)(void* context, void* host_buffer);

/// Reads every node and what it refers to. Throws Error on a graph that refers to bytes outside our buffers.
Graph read_graph(const abi::Host& host, void* cgraph, BufferOf buffer_of, void* context);

/// A graph of the one operation `tensor`, for supports_op: no buffer is looked at.
Graph read_operation(const abi::Host& host, const void* tensor);

/// Brings products of the same input next to each other in the host's graph, before the host gives its tensors their memory: Q, K and V
/// are then one launch, which memory that is reused between them would forbid. Called from the host's graph_optimize.
void order_products(const abi::Host& host, void* cgraph);

/// A digest of all that a plan depends on: ops, shapes, strides, parameters, addresses, and how leaves lie on the ranks.
u64 graph_key(const Graph& graph);

}  // namespace ggml_tp
