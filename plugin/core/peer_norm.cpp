#include "peer_norm.h"

#include <algorithm>
#include <cstring>

#include "norm_peers.h"

namespace ggml_tp {
namespace {

using abi::Op;

constexpr i64 kRowSlack = 1024;  // words: a row ends in whole steps of its threads

/// Evenly, whatever the ranks' shares of weights: it is the links that take the time.
Ranges rows_of(const FusedNormArgs& norm, int n_ranks) { return divide(norm.y.ne[1], 1, n_ranks, {}); }

/// An all_reduce and the norm behind it.
struct Pair {
    size_t reduce = 0;                // the norm is the step after it
    bool is_pushed = false;           // else pulled
    bool in_pieces = false;           // the step in front of it, which adds up pieces of the summand, is the norm's work too
    int product = -1, sum = -1;       // tensors of the graph; sum -1: there is no residual
    std::vector<int> normed;          // the norm's result, and that times its weight: one place
    std::vector<FusedNormArgs> norm;  // [n_ranks], b is the product, or a where there is no residual
    std::vector<Pieces> summands;     // [n_ranks] where it is pushed
};

class Pairs {
  public:
    Pairs(std::vector<ProgramStep>& steps, const Graph& graph, const PeerMemory& memory, std::vector<Arch> archs)
        : steps_(steps), graph_(graph), memory_(memory), archs_(std::move(archs)) {
        for (size_t i = 0; i + 1 < steps.size(); ++i)
            if (Pair pair; find(i, pair)) pairs_.push_back(std::move(pair));
    }
    const std::vector<Pair>& all() const { return pairs_; }

    /// Of one that is not pushed: whether something reads sums but pairs like it, which have the rows that they need.
    bool is_sum_read(const Pair& pair) const {
        for (int reader : readers(pair.sum)) {
            if (is_in(steps_[pair.reduce + 1], reader)) continue;
            const bool by_pair = std::any_of(pairs_.begin(), pairs_.end(), [&](const Pair& other) {
                return !other.is_pushed && other.sum == reader && other.norm[0].a.data == pair.norm[0].sum.data &&
                       same_shape(other.norm[0].a, pair.norm[0].sum);
            });
            if (!by_pair) return true;
        }
        return false;
    }
    /// Whether something in this graph reads the norm's F32 result.
    bool is_normed_read(const Pair& pair) const {
        const ProgramStep& own = steps_[pair.reduce + 1];
        for (int tensor : pair.normed)
            for (int reader : readers(tensor)) {
                if (std::find(pair.normed.begin(), pair.normed.end(), reader) != pair.normed.end()) continue;
                bool found = false;
                for (const ProgramStep& step : steps_) {
                    if (&step == &own || !is_in(step, reader)) continue;
                    found = true;
                    for (size_t r = 0; r < step.launches.size(); ++r)
                        if (refers_into(step.launches[r], pair.norm[r].y.data, graph_.tensors[tensor].bytes)) return true;
                }
                if (!found) return true;
            }
        return false;
    }
    /// Whether later nodes write over it.
    bool is_overwritten(int tensor) const {
        const auto at = std::find(graph_.nodes.begin(), graph_.nodes.end(), tensor);  // a leaf: all nodes are later
        return std::any_of(at == graph_.nodes.end() ? graph_.nodes.begin() : at, graph_.nodes.end(),
                           [&](int id) { return id != tensor && overlap(graph_.tensors[id], graph_.tensors[tensor]); });
    }

  private:
    static bool is_in(const ProgramStep& step, int tensor) { return std::find(step.tensors.begin(), step.tensors.end(), tensor) != step.tensors.end(); }
    std::vector<int> readers(int tensor) const {
        std::vector<int> out;
        for (int id : graph_.nodes)
            for (int s : graph_.tensors[id].src)
                if (id != tensor && s >= 0 && graph_.tensors[s].root == graph_.tensors[tensor].root) {
                    out.push_back(id);
                    break;
                }
        return out;
    }
    bool find(size_t i, Pair& out) const {
        const ProgramStep &reduce = steps_[i], &norm = steps_[i + 1];
        if (reduce.kind != ProgramStep::kAllReduce || reduce.wire != WireType::kF32 || norm.kind != ProgramStep::kLaunch || reduce.tensors.size() != 1)
            return false;
        out.reduce = i;
        out.product = reduce.tensors[0];
        const std::vector<int> of_product = readers(out.product);
        if (of_product.size() != 1 || !is_in(norm, of_product[0]) || graph_.tensors[out.product].is_output) return false;
        for (int id : norm.tensors)
            if (const Op op = graph_.tensors[id].op; op == Op::RMS_NORM || op == Op::MUL) out.normed.push_back(id);
        for (size_t r = 0; r < norm.launches.size(); ++r) {
            const RankLaunch& l = norm.launches[r];
            if (!l.launch.kernel || std::strcmp(l.launch.kernel, "fused_norm")) return false;
            FusedNormArgs args = args_of<FusedNormArgs>(l);
            if (reduce.elems != args.y.ne[0] * args.y.ne[1]) return false;
            if (args.has_b && reinterpret_cast<DevicePtr>(args.a.data) == reduce.pointers[r]) std::swap(args.a, args.b);
            if (reinterpret_cast<DevicePtr>(place_of(args)) != reduce.pointers[r] || (args.has_b && args.a.data == args.b.data)) return false;
            if (r && (args.form != out.norm[0].form || !args.xq != !out.norm[0].xq || args.has_b != out.norm[0].has_b || !same_shape(args.y, out.norm[0].y)))
                return false;
            out.norm.push_back(args);
        }
        if (out.norm[0].has_b) out.sum = of_product[0];
        if (graph_.tensors[of_product[0]].op != (out.norm[0].has_b ? Op::ADD : Op::RMS_NORM)) return false;
        if (push(i, out)) return true;
        return reduce.elems * 4 >= memory_.pull_bytes && can_pull(out.norm);
    }
    /// Whether every rank can.
    bool can_pull(const std::vector<FusedNormArgs>& norms) const {
        PullNormArgs probe{};
        for (size_t r = 0; r < norms.size(); ++r) {
            probe.norm = norms[r];
            if (!pull_norm_launch(probe, archs_[r]).kernel) return false;
        }
        return true;
    }
    static const char* place_of(const FusedNormArgs& norm) { return norm.has_b ? norm.b.data : norm.a.data; }
    /// Whether every rank can push its summand, in pieces if there are any.
    bool push(size_t i, Pair& out) const {
        if (!memory_.pushes(steps_[i].elems * 4)) return false;
        out.summands.assign(out.norm.size(), Pieces{});
        out.in_pieces = i > 0 && pieces_of(steps_[i - 1], out);
        if (!out.in_pieces) out.summands.assign(out.norm.size(), Pieces{});
        out.is_pushed = true;
        for (size_t r = 0; r < out.norm.size(); ++r)
            out.is_pushed &= push_norm(out.norm[r], out.summands[r], static_cast<int>(r), archs_[r], memory_, 0).launch.kernel != nullptr;
        out.in_pieces &= out.is_pushed;
        return out.is_pushed;
    }
    /// A step that adds up pieces of the summand, on the ranks that have pieces.
    static bool pieces_of(const ProgramStep& step, Pair& out) {
        if (step.kind != ProgramStep::kLaunch) return false;
        bool any = false;
        for (size_t r = 0; r < step.launches.size(); ++r) {
            const RankLaunch& l = step.launches[r];
            if (!l.launch.kernel) continue;
            if (std::strcmp(l.launch.kernel, "sum_pieces")) return false;
            const MulPiecesArgs a = args_of<MulPiecesArgs>(l);
            const FusedNormArgs& norm = out.norm[r];
            if (a.wide.n_parts != 1 || a.wide.part[0].y.data != place_of(norm) || a.n_rows != norm.y.ne[0] || a.wide.m != norm.y.ne[1]) return false;
            const bool kept = place_of(norm) != norm.y.data && !(norm.has_b && place_of(norm) == norm.sum.data);
            out.summands[r] = {a.sums, a.n_rows, a.n_rows * a.wide.m, a.n_pieces, kept};
            if (!pieces_in_words(out.summands[r])) return false;
            any = true;
        }
        return any;
    }

    std::vector<ProgramStep>& steps_;
    const Graph& graph_;
    const PeerMemory& memory_;
    const std::vector<Arch> archs_;
    std::vector<Pair> pairs_;
};

}  // namespace

PeerMemory::PeerMemory(const std::vector<std::unique_ptr<Device>>& devices, i64 pull, i64 push, double deadline)
    : n_ranks(static_cast<int>(devices.size())),
      pull_bytes(pull),
      push_bytes(push),
      inbox_words((push / (n_ranks - 1) / 4 + kRowSlack - 1) / kRowSlack * kRowSlack),
      deadline_s(deadline) {
    for (const auto& device : devices) {
        states_.emplace_back(*device, sizeof(PeerState));
        inboxes_.emplace_back(*device, std::max<size_t>(inbox_bytes(), 16));
    }
    reset();
}

void PeerMemory::reset() const {
    for (size_t r = 0; r < states_.size(); ++r) {
        const Device& device = *states_[r].device();
        device.make_current();
        TP_CUDA(device.driver, device.rank, cuMemsetD8Async, states_[r].pointer(), 0, sizeof(PeerState), device.stream);
        if (inbox_words) TP_CUDA(device.driver, device.rank, cuMemsetD8Async, inboxes_[r].pointer(), 0, inbox_bytes(), device.stream);
        if (!device.wait(deadline_s)) throw Error("rank " + std::to_string(device.rank) + " did not clear its counters in time");
    }
}

RankLaunch pull_norm(const std::vector<FusedNormArgs>& norms, int rank, bool whole_sum, bool whole_normed, Arch arch, const PeerMemory& memory,
                     DevicePtr fault) {
    const int n = static_cast<int>(norms.size());
    PullNormArgs args{};
    args.norm = norms[static_cast<size_t>(rank)];
    for (int p = 0; p < n; ++p) {
        const FusedNormArgs& peer = norms[static_cast<size_t>(p)];
        args.summand[p] = peer.b.data;
        args.sum[p] = whole_sum && p != rank ? peer.sum.data : nullptr;
        args.y[p] = whole_normed && p != rank ? peer.y.data : nullptr;
        args.xq[p] = peer.xq, args.xd[p] = peer.xd;
        args.state[p] = memory.state(p);
    }
    args.fault = reinterpret_cast<u32*>(fault);
    args.deadline_ns = static_cast<u64>(memory.deadline_s * 1e9);
    const Range rows = rows_of(args.norm, n)[static_cast<size_t>(rank)];
    args.row_begin = rows.begin, args.row_end = rows.end;
    args.rank = rank, args.n_ranks = n;
    RankLaunch out;
    replace(out, pull_norm_launch(args, arch), args);
    return out;
}

RankLaunch push_norm(const FusedNormArgs& norm, const Pieces& summand, int rank, Arch arch, const PeerMemory& memory, DevicePtr fault) {
    PushNormArgs args{};
    args.norm = norm;
    args.summand = summand;
    args.n_ranks = memory.n_ranks;
    for (int p = 0; p < args.n_ranks; ++p) args.inbox[p] = memory.inbox(p);
    args.inbox_words = memory.inbox_words;
    args.own = memory.state(rank);
    args.fault = reinterpret_cast<u32*>(fault);
    args.deadline_ns = static_cast<u64>(memory.deadline_s * 1e9);
    args.rank = rank;
    RankLaunch out;
    replace(out, push_norm_launch(args, arch), args);
    return out;
}

void join_norms(Program& program, const Graph& graph, const std::vector<std::unique_ptr<Device>>& devices, const PeerMemory& memory,
                const std::vector<DevicePtr>& faults) {
    std::vector<Arch> archs;
    for (const auto& device : devices) archs.push_back(device->arch());
    const Pairs pairs(program.steps, graph, memory, archs);
    const int n = static_cast<int>(devices.size());
    std::vector<size_t> gone;
    for (const Pair& pair : pairs.all()) {
        const bool whole_sum = pair.is_pushed || pairs.is_sum_read(pair) || graph.tensors[pair.sum].is_output,
                   whole_normed = pair.is_pushed || pairs.is_normed_read(pair);
        ProgramStep step;
        step.label = "sum of " + program.steps[pair.reduce].label + ", " + program.steps[pair.reduce + 1].label;
        step.tensors = program.steps[pair.reduce + 1].tensors;
        for (int r = 0; r < n; ++r) {
            const auto at = static_cast<size_t>(r);
            step.launches.push_back(pair.is_pushed ? push_norm(pair.norm[at], pair.summands[at], r, archs[at], memory, faults[at])
                                                   : pull_norm(pair.norm, r, whole_sum, whole_normed, archs[at], memory, faults[at]));
        }
        program.steps[pair.reduce + 1] = std::move(step);
        if (pair.in_pieces) gone.push_back(pair.reduce - 1);
        gone.push_back(pair.reduce);
        // What a later graph, or the host, may want of it is gathered from its owners.
        auto survives = [&](int tensor, bool is_partial) {
            const Tensor& t = graph.tensors[static_cast<size_t>(tensor)];
            if (pairs.is_overwritten(tensor) || !t.buffer) return;
            const Ranges rows = scaled(rows_of(pair.norm[0], n), pair.norm[0].y.ne[0] * 4);
            program.survivors.push_back(
                {t.buffer, {static_cast<i64>(t.address - t.buffer->base), t.bytes, is_partial ? Extent{0, {}, true} : Extent{t.bytes, rows}}});
        };
        survives(pair.product, true);
        if (!whole_sum) survives(pair.sum, false);
        if (!whole_normed && !pair.normed.empty()) survives(pair.normed.back(), false);
    }
    for (auto i = gone.rbegin(); i != gone.rend(); ++i) program.steps.erase(program.steps.begin() + static_cast<std::ptrdiff_t>(*i));
}

}  // namespace ggml_tp
