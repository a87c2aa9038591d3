#include "graph.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "abi/host.h"
#include "abi/tensor.h"

namespace ggml_tp {
namespace {

bool is_view(abi::Op op) { return op == abi::Op::RESHAPE || op == abi::Op::VIEW || op == abi::Op::PERMUTE || op == abi::Op::TRANSPOSE || op == abi::Op::NONE; }

constexpr int kFlagOutput = 2;

class Reader {
  public:
    Reader(const abi::Host& host, BufferOf buffer_of, void* context) : host_(host), buffer_of_(buffer_of), context_(context) {}

    int add(const void* pointer) {
        if (auto found = ids_.find(pointer); found != ids_.end()) return found->second;
        const abi::TensorRef ref(host_, pointer);
        Tensor t;
        t.name = ref.name();
        t.op = host_.op_of(ref);
        t.sub = host_.sub_op_of(ref);
        t.type = ref.type();
        t.bytes = static_cast<i64>(host_.nbytes(pointer));
        for (int d = 0; d < 4; ++d) t.ne[d] = ref.ne(d), t.nb[d] = static_cast<i64>(ref.nb(d));
        for (int i = 0; i < 16; ++i) t.params[i] = ref.op_param_i32(i);
        t.address = reinterpret_cast<u64>(ref.data());
        t.is_output = ref.flags() & kFlagOutput;
        const void* view = ref.view_src();
        int root = -1;
        if (view) {
            const int source = add(view);
            root = graph_.tensors[source].root;
        }
        for (int i = 0; i < 10; ++i) {
            t.src[i] = -1;
            // A leaf's sources are another graph's business.
            if (const void* source = ref.src(i); source && depth_ < 1) t.src[i] = add_source(source);
        }
        void* host_buffer = ref.buffer();
        if (!host_buffer && view) host_buffer = abi::TensorRef(host_, view).buffer();
        if (buffer_of_ && host_buffer) t.buffer = buffer_of_(context_, host_buffer);
        t.id = static_cast<int>(graph_.tensors.size());
        t.root = root < 0 ? t.id : root;
        if (t.buffer && !t.address && t.bytes) throw Error(t.name + " has no memory; the graph is refused");
        if (t.buffer && t.address) {
            const i64 at = static_cast<i64>(t.address - t.buffer->base);
            if (at < 0 || at + t.bytes > t.buffer->size) throw Error(t.name + " lies outside its buffer; the graph is refused");
            if (!t.buffer->is_compute) {
                t.stored = Memory::find(*t.buffer, at);
                if (!t.stored && t.bytes) throw Error(t.name + " refers to bytes that were never announced; the graph is refused");
                if (t.stored) t.offset = at - t.stored->offset;
                if (t.stored && t.offset + t.bytes > t.stored->bytes) throw Error(t.name + " reaches beyond " + t.stored->name + "; the graph is refused");
            } else if (root >= 0) {
                t.offset = static_cast<i64>(t.address - graph_.tensors[root].address);
            }
        }
        ids_[pointer] = t.id;
        graph_.tensors.push_back(t);
        return t.id;
    }

    Graph graph_;

  private:
    int add_source(const void* pointer) {
        if (auto found = ids_.find(pointer); found != ids_.end()) return found->second;
        ++depth_;
        const int id = add(pointer);
        --depth_;
        return id;
    }

    const abi::Host& host_;
    BufferOf buffer_of_;
    void* context_;
    int depth_ = 0;
    std::unordered_map<const void*, int> ids_;
};

bool is_contiguous(const Tensor& t) {
    i64 nb = t.unit_bytes();
    for (int d = 0; d < 4; ++d) {
        if (t.ne[d] != 1 && t.nb[d] != nb) return false;
        nb *= t.ne[d];
    }
    return t.unit_elems() == 1;
}
void reshape(Tensor& t, const i64 (&ne)[4]) {
    i64 nb = t.unit_bytes();
    for (int d = 0; d < 4; ++d) t.ne[d] = ne[d], t.nb[d] = nb, nb *= ne[d];
}

/// A copy into a stored tensor that is written as one row of all sequences' states is one of a row for each of them: elements go over in the same
/// order, and rows are what is divided among ranks. What it reads is given the same shape, as a view of its own.
void in_rows(Graph& graph, int id) {
    const Tensor copy = graph.tensors[static_cast<size_t>(id)], from = graph.tensors[static_cast<size_t>(copy.src[0])];
    if (!copy.stored || !is_contiguous(copy)) return;
    const auto is_flat = [](const Tensor& t) { return t.ne[1] * t.ne[2] * t.ne[3] == 1; };
    if (!is_flat(from)) {
        if (is_flat(copy)) reshape(graph.tensors[static_cast<size_t>(id)], from.ne);
        return;
    }
    const i64 row = copy.stored->ne[0];
    if (!is_flat(copy) || copy.ne[0] % row || copy.ne[0] == row || !is_contiguous(from)) return;
    const i64 rows[4] = {row, copy.ne[0] / row, 1, 1};
    reshape(graph.tensors[static_cast<size_t>(id)], rows);
    Tensor view = from;
    view.id = static_cast<int>(graph.tensors.size());
    view.op = abi::Op::VIEW;
    view.is_node = false;
    std::fill(view.src, view.src + 10, -1);
    view.src[0] = from.id;
    reshape(view, rows);
    graph.tensors[static_cast<size_t>(id)].src[0] = view.id;
    graph.tensors.push_back(view);
}

constexpr int kLookAhead = 48;  // nodes, views counted; Q, K and V with biases and head norms span about 20

struct Hash {
    u64 value = 1469598103934665603ull;
    void mix(u64 x) { value = (value ^ x) * 0x9E3779B97F4A7C15ull, value ^= value >> 29; }
};

}  // namespace

float Tensor::param_f32(int i) const {
    float out;
    std::memcpy(&out, &params[i], 4);
    return out;
}

bool Tensor::is_view_op() const { return is_view(op); }

Graph read_graph(const abi::Host& host, void* cgraph, BufferOf buffer_of, void* context) {
    const abi::GraphRef ref(host, cgraph);
    Reader reader(host, buffer_of, context);
    for (int i = 0; i < ref.n_nodes(); ++i) {
        const int id = reader.add(ref.node(i));
        Tensor& t = reader.graph_.tensors[id];
        t.is_node = true;
        if (t.is_view_op() || t.elems() == 0 || !host.is_computed(abi::TensorRef(host, ref.node(i)))) continue;
        if (!t.buffer) throw Error(t.name + " is to be computed here but lies in another backend's buffer; the graph is refused");
        reader.graph_.nodes.push_back(id);
        if (t.op == abi::Op::CPY) in_rows(reader.graph_, id);
    }
    return std::move(reader.graph_);
}

Graph read_operation(const abi::Host& host, const void* tensor) {
    Reader reader(host, nullptr, nullptr);
    const int id = reader.add(tensor);
    reader.graph_.nodes.push_back(id);
    return std::move(reader.graph_);
}

void order_products(const abi::Host& host, void* cgraph) {
    const abi::GraphRef ref(host, cgraph);
    const int n = ref.n_nodes();
    void** nodes = ref.nodes();
    auto product = [&](int i) { return host.op_of(abi::TensorRef(host, nodes[i])) == abi::Op::MUL_MAT; };
    auto source = [&](int i, int s) { return abi::TensorRef(host, nodes[i]).src(s); };
    // A weight is a leaf: such a product needs nothing but its input, which the earlier one has already.
    auto multiplies_a_leaf = [&](int i) {
        const abi::TensorRef w(host, source(i, 0));
        return host.op_of(w) == abi::Op::NONE && !w.view_src();
    };
    for (int i = 0; i < n; ++i) {
        if (!product(i)) continue;
        int to = i + 1;
        for (const bool same_type : {true, false})
            for (int j = to; j < std::min(n, i + kLookAhead); ++j) {
                if (!product(j) || source(j, 1) != source(i, 1) || !multiplies_a_leaf(j)) continue;
                if ((abi::TensorRef(host, source(j, 0)).type() == abi::TensorRef(host, source(i, 0)).type()) != same_type) continue;
                std::rotate(nodes + to, nodes + j, nodes + j + 1);
                ++to;
            }
        i = to - 1;
    }
}

u64 graph_key(const Graph& graph) {
    Hash hash;
    for (const Tensor& t : graph.tensors) {
        hash.mix(static_cast<u64>(t.op) << 32 | static_cast<u64>(t.type) << 16 | static_cast<u64>(t.sub));
        for (int d = 0; d < 4; ++d) hash.mix(static_cast<u64>(t.ne[d])), hash.mix(static_cast<u64>(t.nb[d]));
        for (int source : t.src) hash.mix(static_cast<u64>(source + 1));
        for (int i = 0; i < 16; i += 2) hash.mix(static_cast<u64>(static_cast<u32>(t.params[i])) << 32 | static_cast<u32>(t.params[i + 1]));
        hash.mix(t.address);
        hash.mix(static_cast<u64>(t.root));
        hash.mix(reinterpret_cast<u64>(t.buffer));
        // Where the bytes lie on every rank: a host may free a buffer and get one at the same address, other memory behind it.
        if (t.stored) {
            for (const DevicePtr shard : t.stored->shard) hash.mix(shard);
            hash.mix(static_cast<u64>(t.stored->sharding.kind) << 8 | static_cast<u64>(t.stored->sharding.axis));
            for (int s = 0; s < t.stored->sharding.n_segments(); ++s)
                for (const Range& range : t.stored->sharding.segment(s).ranges) hash.mix(static_cast<u64>(range.begin)), hash.mix(static_cast<u64>(range.end));
            if (t.stored->extent) {
                hash.mix(static_cast<u64>(t.stored->extent->period_bytes));
                for (int s = 0; s < t.stored->extent->n_segments(); ++s)
                    for (const Range& range : t.stored->extent->segment(s)) hash.mix(static_cast<u64>(range.begin)), hash.mix(static_cast<u64>(range.end));
            }
        } else if (t.buffer) {
            for (const DevicePtr memory : t.buffer->compute) hash.mix(memory);
        }
        if (t.buffer && t.buffer->is_compute && !t.is_node && !t.buffer->residency.empty())
            for (const Residency& r : t.buffer->residency) {
                if (static_cast<i64>(t.address - t.buffer->base) != r.offset) continue;
                hash.mix(static_cast<u64>(r.extent.period_bytes) << 1 | r.extent.is_partial);
                for (int s = 0; s < r.extent.n_segments(); ++s)
                    for (const Range& range : r.extent.segment(s)) hash.mix(static_cast<u64>(range.begin * 31 + range.end));
            }
    }
    for (int node : graph.nodes) hash.mix(static_cast<u64>(node));
    return hash.value;
}

std::string Graph::to_text() const {
    std::string out;
    for (int id : nodes) {
        const Tensor& t = tensors[id];
        out += t.name + " = " + abi::op_name(t.op) + " [";
        for (int d = 0; d < 4; ++d) out += (d ? "," : "") + std::to_string(t.ne[d]);
        out += "]";
        for (int s : t.src)
            if (s >= 0) out += " " + tensors[s].name;
        out += "\n";
    }
    return out;
}

}  // namespace ggml_tp
