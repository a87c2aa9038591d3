#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <utility>

#include "copy.h"
#include "elementwise.h"
#include "experts.h"
#include "flash_attn.h"
#include "flash_wide.h"
#include "fuse.h"
#include "halve_weights.h"
#include "hyper.h"
#include "moves.h"
#include "mul_mat.h"
#include "mul_tile.h"
#include "mul_tile_id.h"
#include "mul_vec.h"
#include "mul_vec_id.h"
#include "mul_few.h"
#include "mul_floats.h"
#include "mul_wgmma.h"
#include "norm.h"
#include "peer_norm.h"
#include "persist.h"
#include "quantize.h"
#include "recurrence.h"
#include "recurrent.h"
#include "reduce.h"
#include "rope.h"
#include "rows.h"
#include "soft_max.h"
#include "sort.h"

namespace ggml_tp {
namespace {

using abi::Op;

constexpr i64 kScratchAlign = 256;
i64 round_up(i64 value, i64 to) { return (value + to - 1) / to * to; }

/// One launch as bytes, before function handles are known.
template <class Args>
RankLaunch make(const Launch& launch, const Args& args) {
    RankLaunch out;
    out.launch = launch;
    out.args.resize(sizeof args);
    std::memcpy(out.args.data(), &args, sizeof args);
    return out;
}

bool is_empty(const View& v) { return v.ne[0] * v.ne[1] * v.ne[2] * v.ne[3] == 0; }

/// Activations in scratch, in the form that a product wants them.
enum class Prepared { kNone, kInt8, kHalf, kBf16, kHalfPanels, kBf16Panels, kHalfEntries, kBf16Entries, kOther };  // kOther: nobody else's

/// What one op needs on one rank: its tensors as that rank sees them.
struct Site {
    const Graph* graph;
    const Tensor* t;
    View y;
    View x[10];
    Matrix w{};  // MUL_MAT, MUL_MAT_ID and GET_ROWS: source 0 as a matrix
    Sharding inputs[10];
    Sharding output;
    int rank = 0;
    Arch arch{};
    DevicePtr scratch = 0;   // quantised activations
    DevicePtr partials = 0;  // of attention
    u32* fault = nullptr;
    i64 k_begin = 0, k_end = 0;  // within w's stored, rounded-out k
    const Stored* w_stored = nullptr;
    Prepared prepared = Prepared::kNone;  // what scratch holds of this very input already
    bool grouped = false;                 // `partials` holds these experts' entries already
    const float* squares = nullptr;       // of a norm of divided rows: their sums over all ranks
};

/// The launches of one op, and the scratch bytes that they use. An empty list with ok = false: no kernel for this.
struct Lowered {
    bool ok = true;
    std::vector<RankLaunch> launches;
    i64 scratch_bytes = 0, partial_bytes = 0;
    Prepared prepared = Prepared::kNone;
    bool grouped = false;  // leaves the entries of experts in `partials`

    template <class Args>
    void add(const Launch& launch, const Args& args) {
        if (!launch.kernel) ok = false;
        launches.push_back(make(launch, args));
    }
};

View view_of(const Tensor& t) {
    View v{};
    for (int d = 0; d < 4; ++d) v.ne[d] = t.ne[d], v.nb[d] = t.nb[d];
    v.type = t.type;
    return v;
}

/// Bytes to a rank's first element.
i64 offset_of(const View& v, const Sharding& s, int rank) { return s.ranges[rank].begin / (s.axis == 0 ? block_elems(v.type) : 1) * v.nb[s.axis]; }

void cut(View& v, const Sharding& s, int rank) {
    if (s.kind != Sharding::kSharded) return;
    v.data += offset_of(v, s, rank);
    v.ne[s.axis] = s.ranges[rank].size();
}

/// Tensor t on one rank under sharding s: compute memory keeps the host's strides, stored shards are compact.
View local_view(const Memory&, const Tensor& t, const Sharding& s, int rank) {
    View v = view_of(t);
    if (t.stored) {
        if (t.stored->format) return v;  // read through its Matrix
        char* base = reinterpret_cast<char*>(t.stored->shard[rank]);
        if (!t.stored->extent) {
            v.data = base + t.offset;
            cut(v, s, rank);
            return v;
        }
        const i64 period = t.stored->extent->period_bytes, local = t.stored->local_period(rank);
        i64 start = t.offset;
        if (s.kind == Sharding::kSharded) {
            start += offset_of(v, s, rank);
            v.ne[s.axis] = s.ranges[rank].size();
        }
        v.data = base + start / period * local + std::max(t.stored->local_offset(rank, start % period), i64{0});  // -1: it has nothing of this
        for (int d = 0; d < 4; ++d)
            if (v.nb[d] >= period) v.nb[d] = v.nb[d] / period * local;
        return v;
    }
    v.data = reinterpret_cast<char*>(t.buffer->compute[rank] + (t.address - t.buffer->base));
    cut(v, s, rank);
    return v;
}

/// A plain tensor as a matrix in the host's block layout.
Matrix host_matrix(const View& v) {
    Matrix m{};
    const WeightFormat* format = find_weight_format(v.type);
    if (!format) return m;
    for (int f = 0; f < format->n_fields; ++f) {
        m.plane[f] = v.data + format->field[f].offset;
        m.block_stride[f] = static_cast<i32>(v.nb[0]);  // a block's bytes, unless a view skips elements
    }
    m.row_stride = v.nb[1];
    m.nb2 = v.nb[2];
    m.nb3 = v.nb[3];
    m.k = v.ne[0];
    m.n = v.ne[1];
    m.ne2 = v.ne[2];
    m.ne3 = v.ne[3];
    m.type = v.type;
    return m;
}

/// What quantises x for a product; its result's place goes to xq and xd. prepare.xd: behind the int8 of all rows.
bool lower_quantize(const Site& s, Lowered& out, QuantizeArgs& prepare) {
    const i64 rows = prepare.x.ne[1] * prepare.x.ne[2] * prepare.x.ne[3];
    prepare.xd = prepare.xq + round_up(rows * prepare.k, kScratchAlign);
    out.scratch_bytes = round_up(rows * prepare.k, kScratchAlign) + rows * (prepare.k / 32) * 8;
    out.prepared = Prepared::kInt8;
    if (s.prepared != out.prepared) out.add(quantize_launch(prepare, s.arch), prepare);
    return true;
}

constexpr i64 kMostEntries = 65535;  // of a product of experts (mul_tile_id_can)

/// A product of many columns on tensor cores, and before it its activations as halves. sums_at: where in the partials its pieces may meet, behind the
/// halves of weights if a launch in front makes them there.
void lower_tiles(const Site& s, Lowered& out, const MulMatArgs& args, const QuantizeArgs& prepare, i64 sums_at) {
    const MulTileArgs tile{args.w, args.y, prepare.xq, s.w.k, args.x.ne[1]};
    const bool bf16 = args.w.type == kBF16, few = mul_few_can(args, s.arch), panels = few || mul_wgmma_can(args, s.arch);
    out.scratch_bytes = panels ? panel_bytes(tile.m, tile.k) : tile.m * tile.k * 2;
    const Prepared before = std::exchange(out.prepared, panels ? (bf16 ? Prepared::kBf16Panels : Prepared::kHalfPanels)
                                                        : bf16 ? Prepared::kBf16
                                                               : Prepared::kHalf);
    if (s.prepared != out.prepared && before != out.prepared)
        out.add(panels ? halve_panels_launch(prepare, bf16, s.arch) : halve_launch(prepare, bf16, s.arch), prepare);
    if (!panels) return out.add(mul_tile_launch(tile, s.arch), tile);
    MulPiecesArgs product = mul_pieces_args(tile, nullptr);
    product.made = sums_at > 0;
    if (const i64 bytes = few ? few_sums_bytes(product, s.arch) : wide_sums_bytes(product, s.arch)) {
        product.sums = reinterpret_cast<float*>(s.partials + static_cast<u64>(sums_at));
        out.partial_bytes = std::max(out.partial_bytes, sums_at + bytes);
    }
    out.add(few ? mul_few_launch(product, s.arch) : mul_wgmma_launch(product, s.arch), product);
}

void lower_expert_products(const Site& s, Lowered& out, MulIdArgs args);

/// A matrix for each head (latent attention's, absorbed) is a product of experts that are taken in turn: a token's slots are its heads.
bool heads_are_experts(const MulMatArgs& m, i32* n_slots) {
    const i64 heads = m.x.ne[2];
    if (!m.w.repacked || m.ratio2 != 1 || heads < 2 || m.x.ne[3] != 1 || m.w.ne3 != 1 || m.dim2_offset_x - m.dim2_offset_w + heads > m.w.ne2) return false;
    *n_slots = static_cast<i32>(heads);
    if (m.x.ne[1] == 1)  // of one token: as many as mul_vec_id takes, and what it takes for tokens are the others
        while (*n_slots > kVecSlots || heads % *n_slots) --*n_slots;
    return true;
}
void lower_heads(const Site& s, Lowered& out, const MulMatArgs& m, i32 n_slots) {
    auto swapped = [&](View v, i64 first, i64 tokens) {
        v.data += first * v.nb[1];
        const i64 per_token = v.nb[1], per_head = v.nb[2], heads = v.ne[2];
        v.ne[1] = n_slots, v.nb[1] = per_head;
        v.ne[2] = tokens * heads / n_slots, v.nb[2] = n_slots == heads ? per_token : n_slots * per_head;
        return v;
    };
    MulIdArgs args{};
    args.w = m.w;
    for (int f = 0; f < 4; ++f)
        if (args.w.plane[f]) args.w.plane[f] += (m.dim2_offset_x - m.dim2_offset_w) * args.w.nb2;
    args.w.ne2 = m.x.ne[2];
    args.k_begin = m.k_begin, args.k_end = m.k_end;
    args.fault = s.fault;
    Site own = s;
    own.prepared = Prepared::kNone, own.grouped = false;
    const i64 most = std::max<i64>(kMostEntries / m.x.ne[2], 1);
    for (i64 first = 0; first < m.x.ne[1]; first += most) {
        const i64 tokens = std::min(most, m.x.ne[1] - first);
        args.x = swapped(m.x, first, tokens), args.y = swapped(m.y, first, tokens);
        args.ids = View{};
        args.ids.type = kI32, args.ids.ne[0] = args.y.ne[1], args.ids.ne[1] = args.y.ne[2], args.ids.ne[2] = args.ids.ne[3] = 1;
        Lowered part;
        lower_expert_products(own, part, args);
        out.ok &= part.ok;
        out.scratch_bytes = std::max(out.scratch_bytes, part.scratch_bytes), out.partial_bytes = std::max(out.partial_bytes, part.partial_bytes);
        std::move(part.launches.begin(), part.launches.end(), std::back_inserter(out.launches));
    }
    out.prepared = Prepared::kOther;
}

void lower_mul_mat(const Site& s, Lowered& out) {
    const Tensor &w = s.graph->tensors[s.t->src[0]], &x = s.graph->tensors[s.t->src[1]];
    if (!find_weight_format(w.type) || w.ne[2] == 0 || w.ne[3] == 0 || x.ne[2] % w.ne[2] || x.ne[3] % w.ne[3]) {
        out.ok = false;
        return;
    }
    MulMatArgs args{};
    args.w = s.w;
    args.x = s.x[1];
    args.y = s.y;
    args.k_begin = s.k_begin;
    args.k_end = s.k_end;
    args.ratio2 = static_cast<i32>(x.ne[2] / w.ne[2]);
    args.ratio3 = static_cast<i32>(x.ne[3] / w.ne[3]);
    if (s.inputs[1].kind == Sharding::kSharded && s.inputs[1].axis == 2) args.dim2_offset_x = s.inputs[1].ranges[s.rank].begin;
    if (s.inputs[0].kind == Sharding::kSharded && s.inputs[0].axis == 2) args.dim2_offset_w = s.inputs[0].ranges[s.rank].begin;
    if (is_empty(s.y)) return;
    if (args.x.ne[2] == 1) {  // of several matrices, as a rank's only head has: kernels of one matrix take the first
        const i64 of_all = args.dim2_offset_x / args.ratio2 - args.dim2_offset_w;
        for (int f = 0; f < 4; ++f)
            if (args.w.plane[f]) args.w.plane[f] += of_all * args.w.nb2;
        args.w.ne2 = 1, args.ratio2 = 1, args.dim2_offset_x = args.dim2_offset_w = 0;
    }
    if (s.k_end == s.k_begin) {  // this rank has no part of the sum: its Partial is zero
        out.add(fill_launch({s.y, 0.0f}, s.arch), FillArgs{s.y, 0.0f});
        return;
    }
    if (i32 n_slots; heads_are_experts(args, &n_slots)) return lower_heads(s, out, args, n_slots);
    const bool vec = mul_vec_can(args, s.arch) && (args.x.ne[1] <= few_least(args.w.type).columns || !mul_few_can(args, s.arch));
    QuantizeArgs prepare{args.x, reinterpret_cast<char*>(s.scratch), nullptr, s.w.k, s.k_begin, s.k_end};
    if (!vec && mul_tile_can(args, s.arch)) return lower_tiles(s, out, args, prepare, 0);
    if (!vec && halve_weights_can(args, s.arch)) {
        const i64 step = halved_rows(args.w);
        const i64 halved_bytes = step * s.w.k * 2;
        out.partial_bytes = halved_bytes;
        for (i64 row = 0; row < args.w.n; row += step) {
            const HalveWeightsArgs weights{args.w, reinterpret_cast<char*>(s.partials), row, std::min(step, args.w.n - row)};
            MulMatArgs part = args;
            part.w = halved(args.w, weights.out, weights.rows);
            part.y = of_rows(args.y, row, weights.rows);
            out.add(halve_weights_launch(weights, s.arch), weights);
            lower_tiles(s, out, part, prepare, halved_bytes);
        }
        return;
    }
    if (mul_mat_needs_quantized_x(s.w, vec)) {
        out.ok &= lower_quantize(s, out, prepare);
        args.xq = prepare.xq;
        args.xd = prepare.xd;
    }
    if (vec) {
        const MulVecArgs products = mul_vec_args(args);
        out.add(mul_vec_launch(products, s.arch), products);
    } else {
        out.add(mul_floats_can(args) ? mul_floats_launch(args, s.arch) : mul_mat_launch(args, s.arch), args);
    }
}

void lower_expert_tiles(const Site& s, Lowered& out, const MulIdArgs& args, const QuantizeArgs& prepare) {
    const bool few = mul_few_id_can(args, s.arch);
    const i32 columns = few ? few_entries(args) : tile_columns(args);
    const i64 entries = args.y.ne[1] * args.y.ne[2], entries_bytes = round_up(entries * 4, kScratchAlign);
    char* place = reinterpret_cast<char*>(s.partials);
    GroupArgs group{};
    group.ids = args.ids;
    group.entries = reinterpret_cast<i32*>(place);
    group.n_tiles = reinterpret_cast<i32*>(place + entries_bytes);
    group.tiles = reinterpret_cast<ExpertTile*>(place + entries_bytes + kScratchAlign);
    group.n_expert = args.w.ne2;
    group.columns = columns;
    group.fault = args.fault;
    out.partial_bytes = entries_bytes + kScratchAlign + most_tiles(entries, args.w.ne2, columns) * static_cast<i64>(sizeof(ExpertTile));
    out.grouped = true;
    if (!s.grouped) out.add(group_launch(group, s.arch), group);  // gate, up and down have the same
    MulTileIdArgs tile{};
    tile.w = args.w;
    tile.y = args.y;
    tile.xh = prepare.xq;
    tile.entries = group.entries;
    tile.tiles = group.tiles;
    tile.n_tiles = group.n_tiles;
    tile.k = args.w.k;
    tile.n_used = static_cast<i32>(args.y.ne[1]);
    tile.x_per_slot = args.x.ne[1] > 1;
    const bool bf16 = args.w.type == kBF16;
    if (few || s.arch.wgmma) {
        const i64 tiles = most_tiles(entries, args.w.ne2, columns);
        const HalveEntriesArgs halve{args.x,       prepare.xq, group.entries, group.tiles,     group.n_tiles, args.w.k,
                                     args.k_begin, args.k_end, tile.n_used,   tile.x_per_slot, columns,       0};
        out.scratch_bytes = tile_panels_bytes(tiles, columns, args.w.k);
        out.prepared = bf16 ? Prepared::kBf16Entries : Prepared::kHalfEntries;
        if (!s.grouped || s.prepared != out.prepared) out.add(halve_entries_launch(halve, tiles, bf16, s.arch), halve);
    } else {
        out.scratch_bytes = args.x.ne[1] * args.x.ne[2] * args.w.k * 2;
        out.prepared = bf16 ? Prepared::kBf16 : Prepared::kHalf;
        if (s.prepared != out.prepared) out.add(halve_launch(prepare, bf16, s.arch), prepare);
    }
    auto multiply = [&] {
        const Launch launch = few            ? mul_few_id_launch(tile, columns, s.arch)
                              : s.arch.wgmma ? mul_wgmma_id_launch(tile, columns, s.arch)
                                             : mul_tile_id_launch(tile, columns, s.arch);
        out.add(launch, tile);
    };
    if (mul_tile_id_can(args, s.arch)) return multiply();
    const i64 step = halved_rows(args.w);
    char* halves = place + round_up(out.partial_bytes, kScratchAlign);
    out.partial_bytes = round_up(out.partial_bytes, kScratchAlign) + step * args.w.ne2 * args.w.k * 2;
    for (i64 row = 0; row < args.w.n; row += step) {
        const HalveWeightsArgs weights{args.w, halves, row, std::min(step, args.w.n - row)};
        tile.w = halved(args.w, halves, weights.rows);
        tile.y = of_rows(args.y, row, weights.rows);
        out.add(halve_weights_launch(weights, s.arch), weights);
        multiply();
    }
}

void lower_mul_mat_id(const Site& s, Lowered& out) {
    const Tensor& w = s.graph->tensors[s.t->src[0]];
    const WeightFormat* format = find_weight_format(w.type);
    if (!format || (!s.w_stored && w.nb[0] != format->block_bytes)) {
        out.ok = false;
        return;
    }
    if (s.k_end == s.k_begin) {
        out.add(fill_launch({s.y, 0.0f}, s.arch), FillArgs{s.y, 0.0f});
        return;
    }
    MulIdArgs args{};
    args.w = s.w;
    args.x = s.x[1];
    args.ids = s.x[2];
    args.y = s.y;
    args.k_begin = s.k_begin;
    args.k_end = s.k_end;
    args.fault = s.fault;
    lower_expert_products(s, out, args);
}
void lower_expert_products(const Site& s, Lowered& out, MulIdArgs args) {
    QuantizeArgs prepare{args.x, reinterpret_cast<char*>(s.scratch), nullptr, s.w.k, s.k_begin, s.k_end};
    const bool once = !args.ids.data && args.y.ne[1] * args.y.ne[2] == args.w.ne2;  // each matrix has one row
    const bool vec = mul_vec_id_can(args, s.arch) && (once || args.y.ne[2] <= few_least(args.w.type).tokens || !mul_few_id_can(args, s.arch));
    if (!vec && (mul_tile_id_can(args, s.arch) || halve_experts_can(args, s.arch))) return lower_expert_tiles(s, out, args, prepare);
    if (mul_mat_needs_quantized_x(s.w, vec)) {
        out.ok &= lower_quantize(s, out, prepare);
        args.xq = prepare.xq;
        args.xd = prepare.xd;
    }
    if (vec) {
        const MulVecIdArgs products = mul_vec_id_args(args);
        out.add(mul_vec_id_launch(products, s.arch), products);
    } else {
        out.add(mul_id_launch(args, s.arch), args);
    }
}

template <class Table, class Key>
auto lookup(const Table& table, Key key) -> decltype(&table[0].second) {
    for (const auto& row : table)
        if (row.first == key) return &row.second;
    return nullptr;
}

constexpr std::pair<Op, BinaryOp> kBinary[] = {
    {Op::ADD, BinaryOp::kAdd}, {Op::ADD1, BinaryOp::kAdd}, {Op::SUB, BinaryOp::kSub}, {Op::MUL, BinaryOp::kMul}, {Op::DIV, BinaryOp::kDiv}};
constexpr std::pair<abi::Unary, UnaryOp> kUnary[] = {{abi::Unary::SILU, UnaryOp::kSilu},
                                                     {abi::Unary::GELU, UnaryOp::kGelu},
                                                     {abi::Unary::RELU, UnaryOp::kRelu},
                                                     {abi::Unary::SIGMOID, UnaryOp::kSigmoid},
                                                     {abi::Unary::GELU_QUICK, UnaryOp::kGeluQuick},
                                                     {abi::Unary::TANH, UnaryOp::kTanh},
                                                     {abi::Unary::NEG, UnaryOp::kNeg},
                                                     {abi::Unary::ABS, UnaryOp::kAbs},
                                                     {abi::Unary::EXP, UnaryOp::kExp},
                                                     {abi::Unary::SGN, UnaryOp::kSgn},
                                                     {abi::Unary::STEP, UnaryOp::kStep},
                                                     {abi::Unary::ELU, UnaryOp::kElu},
                                                     {abi::Unary::HARDSWISH, UnaryOp::kHardSwish},
                                                     {abi::Unary::HARDSIGMOID, UnaryOp::kHardSigmoid},
                                                     {abi::Unary::EXPM1, UnaryOp::kExpm1},
                                                     {abi::Unary::SOFTPLUS, UnaryOp::kSoftplus},
                                                     {abi::Unary::GELU_ERF, UnaryOp::kGeluErf},
                                                     {abi::Unary::XIELU, UnaryOp::kXielu},
                                                     {abi::Unary::FLOOR, UnaryOp::kFloor},
                                                     {abi::Unary::CEIL, UnaryOp::kCeil},
                                                     {abi::Unary::ROUND, UnaryOp::kRound},
                                                     {abi::Unary::TRUNC, UnaryOp::kTrunc}};
constexpr std::pair<abi::Glu, GluOp> kGlu[] = {
    {abi::Glu::SWIGLU, GluOp::kSwiglu},           {abi::Glu::GEGLU, GluOp::kGeglu},        {abi::Glu::REGLU, GluOp::kReglu},
    {abi::Glu::SWIGLU_OAI, GluOp::kSwigluOai},    {abi::Glu::GEGLU_ERF, GluOp::kGegluErf}, {abi::Glu::GEGLU_QUICK, GluOp::kGegluQuick},
    {abi::Glu::SWIGLU_CLAMP, GluOp::kSwigluClamp}};

void lower_binary(const Site& s, Lowered& out) {
    const bool a_whole = s.inputs[0].kind != Sharding::kPartial, b_whole = s.inputs[1].kind != Sharding::kPartial;
    if (s.t->op == Op::ADD && s.output.kind == Sharding::kPartial && a_whole != b_whole && s.rank > 0) {  // the first rank adds what all have
        const CopyArgs mine{s.x[a_whole], s.y};
        if (mine.x.data != mine.y.data) out.add(copy_launch(mine, s.arch), mine);
        return;
    }
    const BinaryArgs args{s.x[0], s.x[1], s.y};
    out.add(binary_launch(*lookup(kBinary, s.t->op), args, s.arch), args);
}
void lower_scale(const Site& s, Lowered& out) {
    const UnaryArgs args{s.x[0], s.y, s.t->param_f32(0), s.t->param_f32(1), 0, 0};
    out.add(unary_launch(s.t->op == Op::CLAMP ? UnaryOp::kClamp : UnaryOp::kScale, args, s.arch), args);
}
constexpr std::pair<Op, UnaryOp> kUnaryOps[] = {{Op::SQR, UnaryOp::kSqr}, {Op::SQRT, UnaryOp::kSqrt}, {Op::LOG, UnaryOp::kLog},
                                                {Op::SIN, UnaryOp::kSin}, {Op::COS, UnaryOp::kCos},   {Op::LEAKY_RELU, UnaryOp::kLeakyRelu}};
void lower_unary(const Site& s, Lowered& out) {
    const UnaryOp* op = s.t->op == Op::UNARY ? lookup(kUnary, static_cast<abi::Unary>(s.t->sub)) : lookup(kUnaryOps, s.t->op);
    UnaryArgs args{s.x[0], s.y, 0, 0, 0, 0};
    if (s.t->op == Op::LEAKY_RELU) args.p0 = s.t->param_f32(0);
    if (op && *op == UnaryOp::kXielu) args.p0 = s.t->param_f32(1), args.p1 = s.t->param_f32(2), args.p2 = s.t->param_f32(3), args.p3 = s.t->param_f32(4);
    if (op) out.add(unary_launch(*op, args, s.arch), args);
    else out.ok = false;
}
void lower_glu(const Site& s, Lowered& out) {
    const GluOp* op = lookup(kGlu, static_cast<abi::Glu>(s.t->sub));
    GluArgs args{s.x[0], s.x[1], s.y, s.t->param_f32(2), s.t->param_f32(3)};
    if (s.t->src[1] < 0) {  // gate and up side by side in one row; op_params[1] swaps them
        args.b = args.a;
        args.a.ne[0] = args.b.ne[0] = s.y.ne[0];
        (s.t->params[1] ? args.a : args.b).data += s.t->ne[0] * args.a.nb[0];
    }
    if (op) out.add(glu_launch(*op, args, s.arch), args);
    else out.ok = false;
}
void lower_norm(const Site& s, Lowered& out) {
    if (s.squares) {
        const NormBySquaresArgs args{s.x[0], s.y, {}, s.squares, s.t->ne[0], 0, s.t->param_f32(0)};
        return out.add(norm_by_squares_launch(args, s.arch), args);
    }
    NormArgs args{};
    args.x = s.x[0];
    args.y = s.y;
    args.eps = s.t->param_f32(0);
    out.add(s.t->op == Op::NORM ? norm_launch(args, s.arch) : rms_norm_launch(args, s.arch), args);
}
void lower_rope(const Site& s, Lowered& out) {
    const i32* p = s.t->params;
    RopeArgs args{};
    args.x = s.x[0];
    args.y = s.y;
    args.pos = s.x[1];
    if (s.t->src[2] >= 0) args.factors = s.x[2];
    args.n_dims = p[1];
    struct Mode {
        i32 number, neox;
        RopeSections sections;
    };
    static constexpr Mode kModes[] = {{0, 0, kNoSections}, {2, 1, kNoSections}, {8, 1, kSideBySide}, {40, 1, kInterleaved}, {24, 1, kVision}};
    const Mode* mode = nullptr;
    for (const Mode& m : kModes)
        if (m.number == p[2]) mode = &m;
    if (!mode) {
        out.ok = false;
        return;
    }
    args.neox = mode->neox;
    args.sectioned = mode->sections;
    if (args.sectioned) std::copy(p + 11, p + 15, args.sections);
    args.direction = s.t->op == Op::ROPE_BACK ? -1.0f : 1.0f;
    args.n_ctx_orig = p[4];
    args.n_offs = p[15];  // zero in hosts from before ggml_rope_set_offset
    args.freq_base = s.t->param_f32(5);
    args.freq_scale = s.t->param_f32(6);
    args.ext_factor = s.t->param_f32(7);
    args.attn_factor = s.t->param_f32(8);
    args.beta_fast = s.t->param_f32(9);
    args.beta_slow = s.t->param_f32(10);
    args.factor = 1.0f;
    if (args.sectioned == kVision) args.n_offs = 0;  // all of a head turns
    args.heads = rope_heads(args, s.arch);
    out.add(rope_launch(args, s.arch), args);
}
void lower_soft_max(const Site& s, Lowered& out) {
    SoftMaxArgs args{};
    args.x = s.x[0];
    args.y = s.y;
    args.has_mask = s.t->src[1] >= 0;
    if (args.has_mask) args.mask = s.x[1];
    args.has_sinks = s.t->src[2] >= 0;
    if (args.has_sinks) args.sinks = s.x[2];
    args.scale = s.t->param_f32(0);
    args.max_bias = s.t->param_f32(1);
    args.n_head_global = static_cast<i32>(s.t->ne[2]);
    if (s.inputs[0].kind == Sharding::kSharded) args.head_offset = static_cast<i32>(s.inputs[0].ranges[s.rank].begin);
    out.add(soft_max_launch(args, s.arch), args);
}
void lower_flash_attn(const Site& s, Lowered& out) {
    FlashAttnArgs args{};
    args.q = s.x[0];
    args.k = s.x[1];
    args.v = s.x[2];
    args.y = s.y;
    args.has_mask = s.t->src[3] >= 0;
    if (args.has_mask) args.mask = s.x[3];
    args.has_sinks = s.t->src[4] >= 0;
    if (args.has_sinks) args.sinks = s.x[4];
    args.scale = s.t->param_f32(0);
    args.max_bias = s.t->param_f32(1);
    args.logit_softcap = s.t->param_f32(2);
    if (args.logit_softcap != 0.0f) args.scale /= args.logit_softcap;  // softcap * tanh(q·k * scale / softcap)
    const Tensor &q = s.graph->tensors[s.t->src[0]], &k = s.graph->tensors[s.t->src[1]];
    args.n_head_global = static_cast<i32>(q.ne[2]);
    if (k.ne[2] == 0 || q.ne[2] % k.ne[2]) {
        out.ok = false;
        return;
    }
    args.gqa_ratio = static_cast<i32>(q.ne[2] / k.ne[2]);
    if (s.inputs[0].kind == Sharding::kSharded) args.head_offset = static_cast<i32>(s.inputs[0].ranges[s.rank].begin);
    if (s.inputs[1].kind == Sharding::kSharded) args.kv_head_offset = static_cast<i32>(s.inputs[1].ranges[s.rank].begin);
    // Quantised keys and values become halves first: one more pass over the cache, and every kernel below takes it.
    const View values = args.v;
    const bool of_keys = values.data == args.k.data && values.type == args.k.type && std::equal(values.ne + 1, values.ne + 4, args.k.ne + 1) &&
                         std::equal(values.nb, values.nb + 4, args.k.nb);  // latent attention: the beginning of each row
    for (View* cache : {&args.k, &args.v}) {
        if (block_elems(cache->type) == 1) continue;
        if (cache == &args.v && of_keys) {
            args.v = args.k;
            args.v.ne[0] = values.ne[0];
            continue;
        }
        CopyBlocksArgs to_halves{host_matrix(*cache), {cache->ne[0], cache->ne[1], cache->ne[2], cache->ne[3]}, *cache};
        View& halves = to_halves.y;
        halves.data = reinterpret_cast<char*>(s.partials + static_cast<u64>(out.partial_bytes));
        halves.type = kF16;
        halves.nb[0] = 2;
        for (int d = 1; d < 4; ++d) halves.nb[d] = halves.nb[d - 1] * halves.ne[d - 1];
        out.partial_bytes += round_up(halves.nb[3] * halves.ne[3], kScratchAlign);
        if (!is_empty(halves)) out.add(copy_from_blocks_launch(to_halves, s.arch), to_halves);
        *cache = halves;
    }
    if (flash_tile_can(args, s.arch)) {
        const FlashTileArgs tile = flash_tile_args(args, s.arch);
        out.add(flash_tile_launch(tile, s.arch), tile);
        return;
    }
    const bool wide = flash_wide_can(args, s.arch);
    if (!wide && !flash_split_can(args, s.arch)) {
        out.add(flash_attn_launch(args, s.arch), args);
        return;
    }
    FlashSplitArgs split = wide ? flash_wide_args(args, s.arch) : flash_split_args(args, s.arch);
    if (wide && split.n_splits == 1) {
        out.add(flash_wide_launch(split, s.arch), split);
        return;
    }
    split.acc = reinterpret_cast<float*>(s.partials + static_cast<u64>(out.partial_bytes));
    out.partial_bytes += round_up(flash_split_acc(split) * 4, kScratchAlign);
    split.meta = reinterpret_cast<float*>(s.partials + static_cast<u64>(out.partial_bytes));
    out.partial_bytes += flash_split_meta(split) * 4;
    FlashCombineArgs combine{};
    combine.y = args.y;
    combine.sinks = args.sinks;
    combine.has_sinks = args.has_sinks;
    combine.head_offset = args.head_offset;
    combine.acc = split.acc;
    combine.meta = split.meta;
    combine.n_splits = split.n_splits;
    out.add(wide ? flash_wide_launch(split, s.arch) : flash_split_launch(split, s.arch), split);
    out.add(flash_combine_launch(combine, s.arch), combine);
}
void lower_get_rows(const Site& s, Lowered& out) {
    const i32 type = s.graph->tensors[s.t->src[0]].type;
    if ((s.w_stored && s.inputs[0].kind != Sharding::kReplicated) || (type != kI32 && !find_weight_format(type))) {
        out.ok = false;
        return;
    }
    GetRowsArgs args{};
    args.w = s.w;
    args.w_view = s.x[0];
    args.idx = s.x[1];
    args.y = s.y;
    args.fault = s.fault;
    out.add(get_rows_launch(args, s.arch), args);
}
void lower_set_rows(const Site& s, Lowered& out) {
    SetRowsArgs args{};
    args.x = s.x[0];
    args.idx = s.x[1];
    args.y = s.y;
    args.fault = s.fault;
    args.n_rows = s.t->ne[1];
    args.block_elems = block_elems(s.t->type);
    args.x.ne[0] /= args.block_elems;
    if (s.t->stored && s.t->stored->extent && s.output.kind != Sharding::kSharded) {
        const Extent& extent = *s.t->stored->extent;
        const i64 unit = s.t->nb[1];
        args.row_period = extent.period_bytes / unit;
        args.row_begin = extent.ranges[s.rank].begin / unit;
        args.row_end = extent.ranges[s.rank].end / unit;
        args.y.data = reinterpret_cast<char*>(s.t->stored->shard[s.rank]);
        if (s.t->offset || extent.period_bytes % unit || extent.ranges[s.rank].begin % unit) out.ok = false;
    }
    out.add(set_rows_launch(args, s.arch), args);
}
void lower_argsort(const Site& s, Lowered& out) {
    const ArgsortArgs args{s.x[0], s.y, s.t->op == Op::TOP_K || s.t->params[0] == 1, 0};  // ggml_sort_order: 0 ascending, 1 descending
    if (!sort_runs_can(args)) return out.add(argsort_launch(args, s.arch), args);
    const i64 n = args.x.ne[0], places = args.y.ne[0], rows = n_rows(args.y), step = sorted_rows(args);
    const i64 buffer = round_up(step * sorted_entries(n, kSortMost, places) * 8, kScratchAlign);
    out.partial_bytes = 2 * buffer;
    for (i64 row = 0; row < rows; row += step) {
        const i64 these = std::min(step, rows - row);
        u64 *from = reinterpret_cast<u64*>(s.partials), *to = reinterpret_cast<u64*>(s.partials + static_cast<u64>(buffer));
        const SortRunsArgs sort{args.x, from, row, these, places, args.descending, 0};
        out.add(sort_runs_launch(sort, s.arch), sort);
        for (i64 run = kSortMost; run < n; run *= kMergeRuns, std::swap(from, to)) {
            const MergeRunsArgs merge{args.y, from, run * kMergeRuns < n ? to : nullptr, row, these, n, places, run};
            out.add(merge_runs_launch(merge, s.arch), merge);
        }
    }
}
void lower_sum_rows(const Site& s, Lowered& out) {
    const UnaryArgs args{s.x[0], s.y, 0, 0, 0, 0};
    out.add(sum_rows_launch(args, s.arch), args);
}
void lower_add_id(const Site& s, Lowered& out) {
    AddIdArgs args{s.x[0], s.x[1], s.x[2], s.y, s.fault, 1, 0};
    if (s.inputs[0].kind == Sharding::kPartial && s.rank > 0) args.has_b = 0;
    out.add(add_id_launch(args, s.arch), args);
}
void lower_fill(const Site& s, Lowered& out) {
    const FillArgs args{s.y, s.t->param_f32(0)};
    out.add(fill_launch(args, s.arch), args);
}
void lower_copy(const Site& s, Lowered& out) {
    const View &x = s.x[0], &y = s.y;
    const bool from_blocks = block_elems(x.type) > 1, to_blocks = block_elems(y.type) > 1;
    if (x.type == y.type && (from_blocks || !is_plain_type(x.type))) {
        const CopyUnitsArgs args = copy_units_args(x, y);
        out.add(copy_units_launch(args, s.arch), args);
    } else if (from_blocks) {
        const CopyBlocksArgs args{s.w, {x.ne[0], x.ne[1], x.ne[2], x.ne[3]}, y};
        out.add(copy_from_blocks_launch(args, s.arch), args);
    } else if (to_blocks) {
        CopyArgs args{x, y};
        args.y.ne[0] /= block_elems(y.type);
        out.add(copy_to_blocks_launch(args, s.arch), args);
    } else {
        const CopyArgs args{x, y};
        out.add(copy_launch(args, s.arch), args);
    }
}

/// All of a into y, then b over (SET) or onto (ACC) a part of y, whose strides and place are parameters.
void lower_into_part(const Site& s, Lowered& out) {
    const CopyArgs whole{s.x[0], s.y};
    out.add(copy_launch(whole, s.arch), whole);
    View part = s.y;
    for (int d = 0; d < 4; ++d) part.ne[d] = s.x[1].ne[d];
    for (int d = 1; d < 4; ++d) part.nb[d] = s.t->params[d - 1];
    part.data += s.t->params[3];
    if (is_empty(part)) return;
    if (s.t->op == Op::ACC) {
        const BinaryArgs sum{part, s.x[1], part};
        out.add(binary_launch(BinaryOp::kAdd, sum, s.arch), sum);
    } else {
        const CopyArgs copy{s.x[1], part};
        out.add(copy_launch(copy, s.arch), copy);
    }
}
MoveArgs move_args(const Site& s) {
    MoveArgs args{};
    args.x = s.x[0];
    args.b = s.x[1];
    args.y = s.y;
    args.bytes = unit_bytes(s.y.type);
    return args;
}
void lower_concat(const Site& s, Lowered& out) {
    MoveArgs args = move_args(s);
    args.p[0] = s.t->params[0];
    for (View* v : {&args.x, &args.b, &args.y}) {  // blocks side by side
        if (v->ne[0] % block_elems(v->type)) out.ok = false;
        v->ne[0] /= block_elems(v->type);
    }
    if (args.p[0] < 0 || args.p[0] > 3) out.ok = false;
    else if (is_empty(args.x)) args.x = args.b, args.p[0] = 0;
    if (out.ok) out.add(concat_launch(args, s.arch), args);
}
void lower_move(const Site& s, Lowered& out) {
    MoveArgs args = move_args(s);
    const i32* p = s.t->params;
    switch (s.t->op) {
        case Op::REPEAT: return out.add(move_launch("repeat", args, s.arch), args);
        case Op::PAD: std::copy(p, p + 9, args.p); return out.add(move_or_fill_launch("pad", args, s.arch), args);
        case Op::ROLL: std::copy(p, p + 4, args.p); return out.add(move_launch("roll", args, s.arch), args);
        case Op::TRI:  // upper and diagonal, upper, lower and diagonal, lower
            args.p[1] = p[0] >= 2;
            args.p[2] = p[0] == 0 || p[0] == 2;
            args.p[3] = p[0] < 2;
            return out.add(move_or_fill_launch("triangle", args, s.arch), args);
        case Op::DIAG_MASK_INF:
            args.p[0] = p[0];
            args.p[1] = args.p[2] = 1;
            args.value = -INFINITY;
            return out.add(move_or_fill_launch("triangle", args, s.arch), args);
        case Op::DIAG: return out.add(move_or_fill_launch("diagonal", args, s.arch), args);
        default:  // ARANGE
            args.value = s.t->param_f32(0);
            args.step = s.t->param_f32(2);
            return out.add(arange_launch(args, s.arch), args);
    }
}
void lower_reduce(const Site& s, Lowered& out) {
    ReduceArgs args{s.x[0], s.y, s.t->param_f32(0), 0};
    switch (s.t->op) {
        case Op::SUM: return out.add(sum_all_launch(args, s.arch), args);
        case Op::MEAN: return out.add(reduce_rows_launch("mean_rows", args, s.arch), args);
        case Op::CUMSUM: return out.add(reduce_rows_launch("cumsum", args, s.arch), args);
        case Op::L2_NORM: return out.add(reduce_rows_launch("l2_norm", args, s.arch), args);
        case Op::ARGMAX:
            if (n_rows(args.x) != args.y.ne[0]) out.ok = false;
            return out.add(reduce_rows_launch("argmax", args, s.arch, kI32), args);
        default:
            args.n_groups = s.t->params[0];
            args.eps = s.t->param_f32(1);
            return out.add(group_norm_launch(args, s.arch), args);
    }
}

bool is_packed(const View& v) {
    i64 bytes = unit_bytes(v.type);
    for (int d = 0; d < 4; ++d) {
        if (v.ne[d] != 1 && v.nb[d] != bytes) return false;
        bytes *= v.ne[d];
    }
    return true;
}
void lower_recurrent(const Site& s, Lowered& out) {
    RecurrentArgs args{};
    std::copy(s.x, s.x + 7, args.src);
    args.y = reinterpret_cast<float*>(s.y.data);  // of this rank's first head
    args.snapshots = 1;
    args.fault = s.fault;
    args.scale = 1.0f;
    const char* kernel = nullptr;
    int sources = 6;
    const View* packed = nullptr;  // the state, whose sequences must be
    const View* x = s.x;
    const Recurrence& op = *recurrence_of(s.t->op);
    for (int i = 0; i < 7 && s.t->src[i] >= 0; ++i) {
        if (op.sources[i].lies == Recurrence::kWhole) continue;
        const Tensor& source = s.graph->tensors[static_cast<size_t>(s.t->src[i])];
        const i64 n = source.ne[op.sources[i].axis], begin = s.inputs[i].kind == Sharding::kSharded ? s.inputs[i].ranges[static_cast<size_t>(s.rank)].begin : 0;
        if (i == op.values) args.n_head_global = n, args.head_begin = begin;
        if (op.sources[i].lies == Recurrence::kGroups && n <= 0) out.ok = false;
        if (op.sources[i].lies == Recurrence::kGroups) args.n_group[i % 2] = n, args.group_begin[i % 2] = begin;  // their two sources are neighbours
    }
    if (!out.ok) return;
    auto heads = [&](const View& v, const View& state) {  // v [n, n_head, all tokens], state [.., n_seqs]
        args.n = args.rows = v.ne[0];
        args.n_head = v.ne[1];
        args.n_seqs = state.ne[1];
        args.n_tokens = args.n_seqs ? v.ne[2] / args.n_seqs : 0;
        packed = &state;
    };
    switch (s.t->op) {
        case Op::SSM_SCAN:
            kernel = "ssm_scan";
            args.n = x[0].ne[0];
            args.rows = x[0].ne[1];
            args.n_head = x[1].ne[1];
            args.n_tokens = x[1].ne[2];
            args.n_seqs = x[1].ne[3];
            args.snapshots = std::max(1, s.t->params[0]);  // 0 in hosts from before there were several
            if (x[6].type != kI32 || args.n_head_global % args.n_group[0] || args.n_group[0] != args.n_group[1]) out.ok = false;
            break;
        case Op::GATED_DELTA_NET:
            kernel = "gated_delta_net";
            args.n = args.rows = x[2].ne[0];
            args.n_head = x[2].ne[1];
            args.n_tokens = x[2].ne[2];
            args.n_seqs = x[2].ne[3];
            args.snapshots = std::max(1, s.t->params[0]);
            args.scale = 1.0f / std::sqrt(static_cast<float>(args.n));
            if (x[0].ne[3] == 0 || x[1].ne[3] == 0 || x[2].ne[3] % x[0].ne[3] || x[2].ne[3] % x[1].ne[3]) out.ok = false;
            if ((x[3].ne[0] != 1 && x[3].ne[0] != args.n) || x[5].nb[0] != 4) out.ok = false;
            break;
        case Op::GATED_LINEAR_ATTN:
            kernel = "gated_linear_attn";
            args.scale = s.t->param_f32(0);
            sources = 5;
            heads(x[1], x[4]);
            break;
        case Op::RWKV_WKV6:
            kernel = "rwkv_wkv6";
            heads(x[1], x[5]);
            break;
        default:
            kernel = "rwkv_wkv7";
            sources = 7;
            heads(x[3], x[6]);
            break;
    }
    if (!is_packed(view_of(*s.t)) || (packed && packed->nb[0] != 4)) out.ok = false;
    const i64 y_elems = args.rows * args.n_head_global * args.n_tokens * args.n_seqs, y_begin = args.head_begin * args.rows;
    args.state = args.y - y_begin + y_elems + y_begin * args.n;
    out.add(recurrent_launch(kernel, args, sources, s.arch), args);
}
void lower_ssm_conv(const Site& s, Lowered& out) {
    const BinaryArgs args{s.x[0], s.x[1], s.y};
    out.add(s.t->op == Op::SSM_CONV ? ssm_conv_launch(args, s.arch) : solve_tri_launch(args, s.arch), args);
}
/// y[n, m] = sum over k of a[n, k] * b[m, k].
void lower_out_prod(const Site& s, Lowered& out) {
    const View &a = s.x[0], &b = s.x[1];
    const WeightFormat* format = find_weight_format(a.type);
    if (!format || (!s.w_stored && format->block_elems > 1 && a.nb[0] != format->block_bytes) || a.ne[2] == 0 || a.ne[3] == 0 || b.ne[2] % a.ne[2] ||
        b.ne[3] % a.ne[3]) {
        out.ok = false;
        return;
    }
    MulMatArgs args{};
    args.w = s.w;
    args.x = b;
    args.y = s.y;
    args.ratio2 = static_cast<i32>(b.ne[2] / a.ne[2]);
    args.ratio3 = static_cast<i32>(b.ne[3] / a.ne[3]);
    out.add(out_prod_launch(args, s.arch), args);
}
void lower_indexer(const Site& s, Lowered& out) {
    const IndexerArgs args{s.x[0], s.x[2], s.x[3], s.y, host_matrix(s.x[1])};
    out.add(indexer_launch(args, s.arch), args);
}
void lower_hyper(const Site& s, Lowered& out) {
    HyperArgs args{};
    args.x = s.x[0];
    args.residual = s.x[1];
    args.post = s.x[2];
    args.comb = s.x[3];
    args.y = s.y;
    switch (s.t->op) {
        case Op::DSV4_HC_PRE:
            args.scale = s.t->param_f32(0);
            args.flag = s.t->params[1];
            return out.add(hyper_launch("hyper_pre", args, s.y, s.arch), args);
        case Op::DSV4_HC_POST: args.flag = s.t->src[3] < 0; return out.add(hyper_launch("hyper_post", args, s.y, s.arch), args);
        default:
            args.eps = s.t->param_f32(0);
            args.n_iter = s.t->params[1];
            if (args.x.ne[0] != 24) out.ok = false;  // four streams
            return out.add(hyper_launch("hyper_comb", args, s.x[0], s.arch), args);
    }
}

struct Row {
    Op op;
    void (*lower)(const Site&, Lowered&);
};
constexpr Row kRows[] = {
    {Op::MUL_MAT, lower_mul_mat},
    {Op::ADD, lower_binary},
    {Op::SUB, lower_binary},
    {Op::MUL, lower_binary},
    {Op::DIV, lower_binary},
    {Op::SCALE, lower_scale},
    {Op::CLAMP, lower_scale},
    {Op::UNARY, lower_unary},
    {Op::SQR, lower_unary},
    {Op::SQRT, lower_unary},
    {Op::GLU, lower_glu},
    {Op::RMS_NORM, lower_norm},
    {Op::NORM, lower_norm},
    {Op::ROPE, lower_rope},
    {Op::SOFT_MAX, lower_soft_max},
    {Op::FLASH_ATTN_EXT, lower_flash_attn},
    {Op::GET_ROWS, lower_get_rows},
    {Op::SET_ROWS, lower_set_rows},
    {Op::CPY, lower_copy},
    {Op::CONT, lower_copy},
    {Op::DUP, lower_copy},
    {Op::MUL_MAT_ID, lower_mul_mat_id},
    {Op::ADD_ID, lower_add_id},
    {Op::ARGSORT, lower_argsort},
    {Op::TOP_K, lower_argsort},
    {Op::SUM_ROWS, lower_sum_rows},
    {Op::FILL, lower_fill},
    {Op::ROPE_BACK, lower_rope},
    {Op::LOG, lower_unary},
    {Op::SIN, lower_unary},
    {Op::COS, lower_unary},
    {Op::LEAKY_RELU, lower_unary},
    {Op::ADD1, lower_binary},
    {Op::ACC, lower_into_part},
    {Op::SET, lower_into_part},
    {Op::SUM, lower_reduce},
    {Op::MEAN, lower_reduce},
    {Op::CUMSUM, lower_reduce},
    {Op::ARGMAX, lower_reduce},
    {Op::L2_NORM, lower_reduce},
    {Op::GROUP_NORM, lower_reduce},
    {Op::REPEAT, lower_move},
    {Op::CONCAT, lower_concat},
    {Op::PAD, lower_move},
    {Op::ROLL, lower_move},
    {Op::ARANGE, lower_move},
    {Op::TRI, lower_move},
    {Op::DIAG, lower_move},
    {Op::DIAG_MASK_INF, lower_move},
    {Op::SSM_CONV, lower_ssm_conv},
    {Op::SOLVE_TRI, lower_ssm_conv},
    {Op::SSM_SCAN, lower_recurrent},
    {Op::GATED_DELTA_NET, lower_recurrent},
    {Op::GATED_LINEAR_ATTN, lower_recurrent},
    {Op::RWKV_WKV6, lower_recurrent},
    {Op::RWKV_WKV7, lower_recurrent},
    {Op::OUT_PROD, lower_out_prod},
    {Op::LIGHTNING_INDEXER, lower_indexer},
    {Op::DSV4_HC_COMB, lower_hyper},
    {Op::DSV4_HC_PRE, lower_hyper},
    {Op::DSV4_HC_POST, lower_hyper},
};

struct SegmentStep : PlanStep {
    int segment = 0;
};

/// A step whose result is divided in segments, once for each of them: kernels know one range.
std::vector<SegmentStep> one_segment_each(const std::vector<PlanStep>& steps) {
    std::vector<SegmentStep> out;
    for (const PlanStep& step : steps) {
        out.push_back({step, 0});
        if (step.kind != PlanStep::kCompute || step.output.rest.empty()) continue;
        out.pop_back();
        for (int i = 0; i < step.output.n_segments(); ++i) {
            out.push_back({step, i});
            SegmentStep& one = out.back();
            for (Sharding& input : one.inputs)
                if (!input.rest.empty()) input = input.segment(i);
            one.output = step.output.segment(i);
        }
    }
    return out;
}

/// Where a GET_ROWS reads a table that is not in our memory.
std::optional<Program::HostRows> host_rows(const Graph& graph, const Tensor& t) {
    if (t.op != Op::GET_ROWS || graph.tensors[t.src[0]].buffer) return std::nullopt;
    const Tensor &table = graph.tensors[t.src[0]], &ids = graph.tensors[t.src[1]];
    if (!table.address || !ids.buffer) throw Error(t.name + " reads rows that have no memory; the graph is refused");
    return Program::HostRows{table.name, reinterpret_cast<const char*>(table.address),     table.nb[1], table.ne[1], ids.elems(),
                             ids.buffer, static_cast<i64>(ids.address - ids.buffer->base), {},          {}};
}

/// Sums of squares of divided rows: where each norm's lie on each rank, and the steps that compute and add them up.
class NormSquares {
  public:
    NormSquares(const Plan& plan, const Graph& graph, std::vector<std::unique_ptr<Device>>& devices, Program& program) : graph_(graph) {
        i64 floats = 0;
        for (const PlanStep& step : plan.steps)
            for (int norm : step.norms) {
                at_[norm] = floats;
                floats += n_rows_of(norm);
            }
        if (!floats) return;
        for (const auto& device : devices) {
            DeviceBlock block(*device, static_cast<size_t>(floats) * 4);
            sums_.push_back(reinterpret_cast<float*>(block.pointer()));
            program.blocks.push_back(std::move(block));
        }
    }
    /// Null: it is no norm of divided rows.
    const float* of(int norm, int rank) const {
        const auto found = at_.find(norm);
        return found == at_.end() ? nullptr : sums_[static_cast<size_t>(rank)] + found->second;
    }
    void lower(const PlanStep& step, const LoweringContext& context, std::vector<ProgramStep>& steps) const {
        ProgramStep squares, reduce;
        squares.label = reduce.label = "squares of " + step.names(graph_);
        squares.tensors = reduce.tensors = step.norms;
        reduce.kind = ProgramStep::kAllReduce;
        reduce.elems = static_cast<i64>(step.norms.size()) * n_rows_of(step.tensor);
        for (size_t r = 0; r < sums_.size(); ++r) {
            RowSquaresArgs args{};
            args.sums = sums_[r] + at_.at(step.tensor), args.rows = n_rows_of(step.tensor), args.n_parts = static_cast<i32>(step.norms.size());
            for (size_t i = 0; i < step.norms.size(); ++i) {
                const Sharding once = sharded(0, owned_once(step.inputs[i].ranges));  // heads that several ranks have count once
                args.x[i] = local_view(context.memory, graph_.tensors[static_cast<size_t>(graph_.tensors[static_cast<size_t>(step.norms[i])].src[0])], once,
                                       static_cast<int>(r));
            }
            const Launch launch = row_squares_launch(args, context.devices[r]->arch());
            if (!launch.kernel) throw Error("no kernel for the sums of squares of " + step.names(graph_));
            squares.launches.push_back(make(launch, args));
            reduce.pointers.push_back(reinterpret_cast<DevicePtr>(args.sums));
        }
        steps.push_back(std::move(squares));
        steps.push_back(std::move(reduce));
    }

  private:
    i64 n_rows_of(int norm) const {
        const Tensor& t = graph_.tensors[static_cast<size_t>(norm)];
        return t.elems() / t.ne[0];
    }
    const Graph& graph_;
    std::map<int, i64> at_;     // floats, by norm: norms that are added up together lie one behind the other
    std::vector<float*> sums_;  // [n_ranks]
};

const Row* row_of(Op op) {
    for (const Row& row : kRows)
        if (row.op == op) return &row;
    return nullptr;
}

}  // namespace

Scratch::~Scratch() {
    for (size_t r = 0; r < devices_.size(); ++r) devices_[r]->release(pointers_[r]);
    for (auto& [rank, pointer] : retired_) devices_[rank]->release(pointer);
}

bool Scratch::grow(i64 bytes, i64 partial_bytes) {
    if (bytes <= bytes_ && partial_bytes <= partial_bytes_) return false;
    bytes = std::max(bytes, bytes_), partial_bytes = std::max(partial_bytes, partial_bytes_);
    for (size_t r = 0; r < devices_.size(); ++r) {
        const DevicePtr fresh = devices_[r]->allocate(static_cast<size_t>(bytes + partial_bytes));
        if (pointers_[r]) retired_.push_back({static_cast<int>(r), pointers_[r]});
        pointers_[r] = fresh;
    }
    bytes_ = bytes, partial_bytes_ = partial_bytes;
    return true;
}

RowStaging::~RowStaging() {
    for (char* pinned : pinned_) memory_.release_pinned(pinned);
}

bool RowStaging::grow(i64 bytes) {
    device_.grow(bytes);
    if (bytes <= bytes_) return false;
    pinned_.push_back(memory_.allocate_pinned(bytes));
    bytes_ = bytes;
    return true;
}

std::string Program::to_text() const {
    std::string out;
    for (const ProgramStep& step : steps) {
        if (step.kind == ProgramStep::kAllReduce) {
            out += "all_reduce " + step.label + " " + std::to_string(step.elems) + (step.wire == WireType::kF32 ? " f32\n" : " i32\n");
            continue;
        }
        out += step.label + ":";
        for (const RankLaunch& l : step.launches) {
            if (!l.launch.kernel) out += " -";
            else
                out += std::string(" ") + l.launch.kernel + "<" + std::to_string(l.launch.grid[0]) + "," + std::to_string(l.launch.grid[1]) + "," +
                       std::to_string(l.launch.grid[2]) + ">";
        }
        out += "\n" + step.detail;
    }
    return out;
}

std::unique_ptr<Program> lower(const Graph& graph, const Plan& plan, LoweringContext context) {
    auto program = std::make_unique<Program>();
    const int n = plan.n_ranks;
    NormSquares squares(plan, graph, context.devices, *program);
    // Again where more scratch memory must be there than is: its address stands in arguments.
    for (bool placed = false; !placed;) {
        i64 scratch_bytes = 0, partial_bytes = 0;
        program->steps.clear();
        program->host_rows.clear();
        struct Quantized {
            int x = -1;
            Sharding s;
            i64 k = 0, k_begin = 0;
            std::vector<Prepared> prepared;  // [n_ranks]
        } last;
        int last_ids = -1;  // whose entries are in every rank's partials
        i64 row_bytes = 0;
        for (const SegmentStep& step : one_segment_each(plan.steps)) {
            const Tensor& t = graph.tensors[step.tensor];
            if (step.kind == PlanStep::kSumSquares) {
                squares.lower(step, context, program->steps);
                continue;
            }
            if (step.kind != PlanStep::kCompute) {
                last.x = -1;
                if (step.kind == PlanStep::kAllGather) {
                    // Every byte but a rank's own becomes zero, then bit patterns are added as integers: exact, and rare enough.
                    std::vector<ProgramStep> zero(static_cast<size_t>(step.part.extent.n_segments()) + 1);
                    for (ProgramStep& z : zero) z.label = "zero " + t.name, z.tensors = {t.id}, z.launches.resize(n);
                    std::vector<Ranges> owned;  // of each segment; maybe two have the same: then it is the first one's
                    for (int side = 0; side < step.part.extent.n_segments(); ++side) owned.push_back(owned_once(step.part.extent.segment(side)));
                    for (int r = 0; r < n; ++r) {
                        i64 at = 0;
                        for (size_t side = 0; side < zero.size(); ++side) {
                            const i64 end = step.part.extent.period_bytes;
                            const Range own = side < owned.size() ? owned[side][static_cast<size_t>(r)] : Range{end, end};
                            const Range foreign{at, own.begin};
                            at = own.end;
                            if (foreign.size() <= 0) continue;
                            const i64 unit = (foreign.begin | foreign.end | step.part.extent.period_bytes) % 4 ? 2 : 4;  // halves may end within a word
                            if (foreign.begin % unit || foreign.size() % unit) throw Error(t.name + " cannot be gathered: its pieces are not whole halves");
                            View v{};
                            v.data = reinterpret_cast<char*>(t.buffer->compute[r] + (t.address - t.buffer->base) + static_cast<u64>(step.part.bytes.begin)) +
                                     foreign.begin;
                            v.type = unit == 4 ? kF32 : kF16;
                            const i64 ne[4] = {foreign.size() / unit, step.part.bytes.size() / step.part.extent.period_bytes, 1, 1};
                            for (int d = 0; d < 4; ++d) v.ne[d] = ne[d], v.nb[d] = d == 0 ? unit : step.part.extent.period_bytes;
                            zero[side].launches[r] = make(fill_launch({v, 0.0f}, context.devices[r]->arch()), FillArgs{v, 0.0f});
                        }
                    }
                    for (ProgramStep& z : zero) program->steps.push_back(std::move(z));
                }
                ProgramStep reduce;
                reduce.kind = ProgramStep::kAllReduce;
                reduce.label = t.name;
                reduce.tensors = {t.id};
                const Range bytes = step.kind == PlanStep::kAllGather ? step.part.bytes : Range{0, t.bytes};
                reduce.elems = (bytes.size() + 3) / 4;  // a last half has padding of the host's beside it, whose sum is nobody's
                reduce.wire = step.kind == PlanStep::kAllGather ? WireType::kI32 : WireType::kF32;
                for (int r = 0; r < n; ++r) reduce.pointers.push_back(t.buffer->compute[r] + (t.address - t.buffer->base) + static_cast<u64>(bytes.begin));
                program->steps.push_back(std::move(reduce));
                continue;
            }
            const Row* row = row_of(t.op);
            if (!row) throw Error(std::string("no kernel for ") + abi::op_name(t.op) + " (" + t.name + "); supports_op had refused it");
            std::vector<Lowered> lowered(n);
            size_t most = 0;
            std::optional<Program::HostRows> rows = host_rows(graph, t);
            if (rows) {
                rows->pinned = context.rows.pinned() + row_bytes;
                rows->is_pinned = context.memory.is_pinned(rows->pinned, rows->bytes());
                for (int r = 0; r < n; ++r) rows->to.push_back(context.rows.pointer(r) + static_cast<u64>(row_bytes));
                row_bytes += rows->bytes();
            }
            Quantized now;
            now.prepared.resize(static_cast<size_t>(n), Prepared::kNone);
            for (int r = 0; r < n; ++r) {
                Site site{};
                site.graph = &graph;
                site.t = &t;
                site.rank = r;
                site.arch = context.devices[r]->arch();
                site.scratch = context.scratch.pointer(r);
                site.partials = context.scratch.partials(r);
                site.fault = reinterpret_cast<u32*>(context.faults[r]);
                site.output = step.output;
                site.squares = squares.of(t.id, r);
                site.y = local_view(context.memory, t, step.output, r);
                for (int i = 0; i < 10; ++i) {
                    if (t.src[i] < 0) continue;
                    if (static_cast<size_t>(i) < step.inputs.size()) site.inputs[i] = step.inputs[i];
                    const Tensor& source = graph.tensors[t.src[i]];
                    if (source.buffer) site.x[i] = local_view(context.memory, source, site.inputs[i], r);
                }
                if (t.src[0] >= 0) {
                    const Tensor& w = graph.tensors[t.src[0]];
                    const bool planes = w.stored && w.stored->format;
                    site.w = planes ? context.memory.matrix(*w.stored, r, step.segment) : host_matrix(site.x[0]);
                    site.w_stored = planes ? w.stored : nullptr;
                    if (planes) {  // matrices along another axis, as a host reshapes them
                        const bool same = w.offset == 0 && w.ne[0] == w.stored->ne[0] && w.ne[1] == w.stored->ne[1];
                        if (!same) throw Error("a part of " + w.stored->name + " is read, which lies repacked");
                        site.w.ne2 = w.ne[2], site.w.ne3 = w.ne[3];
                        site.w.nb3 = site.w.nb2 * w.ne[2];
                    }
                    site.k_end = site.w.k;
                    if (planes && w.stored->sharding.kind == Sharding::kSharded && w.stored->sharding.axis == 0) {
                        const i64 stored_from = w.stored->planes[r].block_begin * w.stored->format->block_elems;
                        site.k_begin = w.stored->sharding.ranges[r].begin - stored_from;
                        site.k_end = w.stored->sharding.ranges[r].end - stored_from;
                    } else if (planes) {
                        site.k_end = w.ne[0];
                    }
                }
                if (rows) {
                    View& table = site.x[0];
                    table = view_of(graph.tensors[t.src[0]]);
                    table.data = reinterpret_cast<char*>(rows->to[static_cast<size_t>(r)]), table.ne[1] = rows->n;
                    site.x[1].data = table.data + rows->ids_at();
                    site.w = host_matrix(table);
                }
                if (t.op == Op::MUL_MAT || t.op == Op::MUL_MAT_ID) {
                    now.x = t.src[1], now.s = step.inputs[1], now.k = site.w.k, now.k_begin = site.k_begin;
                    // Q, K and V, gate and up read the same input: it is quantised once.
                    if (last.x == now.x && last.s == now.s && last.s.kind != Sharding::kSharded && last.k == now.k) site.prepared = last.prepared[r];
                }
                site.grouped = t.op == Op::MUL_MAT_ID && last_ids == t.src[2];
                if (!is_empty(site.y) || (t.op == Op::SET_ROWS && site.output.kind != Sharding::kSharded)) row->lower(site, lowered[r]);
                if (!lowered[r].ok) throw Error(std::string("no kernel for ") + abi::op_name(t.op) + " (" + t.name + ") with these types and strides");
                scratch_bytes = std::max(scratch_bytes, round_up(lowered[r].scratch_bytes, kScratchAlign));
                partial_bytes = std::max(partial_bytes, lowered[r].partial_bytes);
                most = std::max(most, lowered[r].launches.size());
                now.prepared[r] = lowered[r].prepared;
            }
            auto uses_partials = [](const Lowered& l) { return l.partial_bytes > 0; };
            if (std::any_of(lowered.begin(), lowered.end(), uses_partials))
                last_ids = std::all_of(lowered.begin(), lowered.end(), [](const Lowered& l) { return l.grouped; }) ? t.src[2] : -1;
            if (std::any_of(now.prepared.begin(), now.prepared.end(), [](Prepared p) { return p != Prepared::kNone; })) last = now;
            // A later writer over the quantised input's memory makes the copy stale.
            if (last.x >= 0 && !t.stored && last.x != now.x) {
                const Tensor& x = graph.tensors[last.x];
                if (!x.stored && x.buffer == t.buffer && x.address < t.address + static_cast<u64>(t.bytes) && t.address < x.address + static_cast<u64>(x.bytes))
                    last.x = -1;
            }
            if (rows) program->host_rows.push_back(std::move(*rows));
            for (size_t i = 0; i < most; ++i) {
                ProgramStep out;
                out.label = t.name;
                out.tensors = {t.id};
                out.launches.resize(n);
                for (int r = 0; r < n; ++r) {
                    if (i >= lowered[r].launches.size()) continue;
                    out.launches[r] = std::move(lowered[r].launches[i]);
                    out.launches[r].function = context.devices[r]->function(out.launches[r].launch.kernel);
                }
                program->steps.push_back(std::move(out));
            }
        }
        placed = !context.scratch.grow(scratch_bytes, partial_bytes);
        placed &= !context.rows.grow(row_bytes);
    }
    std::vector<Arch> archs;
    for (const auto& device : context.devices) archs.push_back(device->arch());
    fuse(program->steps, archs);
    if (context.stream) persist(*program, context.devices, *context.stream, context.faults);
    if (context.peers) join_norms(*program, graph, context.devices, *context.peers, context.faults);
    for (ProgramStep& step : program->steps) {
        for (int r = 0; r < static_cast<int>(step.launches.size()); ++r)
            if (step.launches[r].launch.kernel && !step.launches[r].function)
                step.launches[r].function = context.devices[r]->function(step.launches[r].launch.kernel);
        program->kernel_launches += step.kind == ProgramStep::kLaunch;
    }
    program->all_reduces = plan.n_all_reduces();
    program->all_gathers = plan.count(PlanStep::kAllGather);
    for (int id : graph.nodes) {
        const Tensor& root = graph.tensors[graph.tensors[id].root];
        if (!root.stored && root.buffer) program->written.push_back({root.buffer, static_cast<i64>(root.address - root.buffer->base), root.bytes});
    }
    for (const PlanStep& step : plan.steps) {  // a leaf that an earlier graph left as a Partial is one no longer
        if (step.kind != PlanStep::kAllReduce) continue;
        const Tensor& root = graph.tensors[step.tensor];
        program->written.push_back({root.buffer, static_cast<i64>(root.address - root.buffer->base), root.bytes});
    }
    for (const Tensor& t : graph.tensors)
        if (t.buffer && t.buffer->is_compute && !t.is_node && t.root == t.id) {
            const i64 offset = static_cast<i64>(t.address - t.buffer->base);
            program->leaves.push_back({t.buffer, offset, t.bytes, t.buffer->extent_at(offset, t.bytes)});
        }
    for (const Plan::Survivor& s : plan.survivors) {
        const Tensor& root = graph.tensors[s.root];
        program->survivors.push_back(
            {root.buffer, {static_cast<i64>(root.address - root.buffer->base) + s.part.bytes.begin, s.part.bytes.size(), s.part.extent}});
    }
    return program;
}

bool can_lower(const Graph& operation, const std::vector<Arch>& archs) {
    const Tensor& t = operation.tensors[operation.nodes.at(0)];
    if (t.is_view_op()) return true;
    const Row* row = row_of(t.op);
    if (!row) return false;
    for (const Arch& arch : archs) {
        Site site{};
        site.graph = &operation;
        site.t = &t;
        site.arch = arch;
        site.y = view_of(t);
        for (int i = 0; i < 10; ++i)
            if (t.src[i] >= 0) site.x[i] = view_of(operation.tensors[t.src[i]]);
        if (t.src[0] >= 0) {
            site.w = host_matrix(site.x[0]);
            site.k_end = site.w.k;
        }
        Lowered lowered;
        if (!is_empty(site.y)) row->lower(site, lowered);
        if (!lowered.ok) return false;
    }
    return true;
}

}  // namespace ggml_tp
