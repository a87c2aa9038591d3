// The argument structs of every kernel: read by the core (which fills them) and by device code (which runs them).
// A kernel takes exactly one of them, by value. Plain C++, no includes: NVRTC, g++ and the core see the same bytes.
// Order of dimensions is ggml's: ne[0] is the fastest. Strides (nb) are bytes. Everything is what ONE rank sees:
// a sharded tensor appears as a View whose data points at the rank's first element and whose ne is the local extent.
#pragma once

namespace ggml_tp {

using i32 = int;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

// Element types, by ggml's numbers (never renumbered by upstream).
enum Type : i32 {
    kF32 = 0,
    kF16 = 1,
    kQ4_0 = 2,
    kQ4_1 = 3,
    kQ5_0 = 6,
    kQ5_1 = 7,
    kQ8_0 = 8,
    kQ8_1 = 9,
    kQ2_K = 10,
    kQ3_K = 11,
    kQ4_K = 12,
    kQ5_K = 13,
    kQ6_K = 14,
    kQ8_K = 15,
    kIQ2_XXS = 16,
    kIQ2_XS = 17,
    kIQ3_XXS = 18,
    kIQ1_S = 19,
    kIQ4_NL = 20,
    kIQ3_S = 21,
    kIQ2_S = 22,
    kIQ4_XS = 23,
    kI8 = 24,
    kI16 = 25,
    kI32 = 26,
    kI64 = 27,
    kIQ1_M = 29,
    kBF16 = 30,
    kTQ1_0 = 34,
    kTQ2_0 = 35,
    kMXFP4 = 39,
    kNVFP4 = 40,
    kQ1_0 = 41,
    kQ2_0 = 42,
};

struct View {
    char* data;
    i64 ne[4];
    i64 nb[4];
    i32 type;
    i32 pad;
};
static_assert(sizeof(View) == 80, "View crosses the host/device boundary");

// A weight matrix [ne0 = k, ne1 = n, ne2, ne3] of any type, as up to four planes of fields (see weight_format.h):
// field f of block b of row r of matrix (i2, i3) starts at plane[f] + b*block_stride[f] + r*row_stride + i2*nb2 + i3*nb3.
// Unquantised types are one plane with a "block" of one element. The host's own block layout is the same struct with
// block_stride = type size in every field; the repacked layout has block_stride = field size, and a row's planes side by side, each from a multiple of 16
// bytes on.
struct Matrix {
    const char* plane[4];
    i64 row_stride, nb2, nb3;
    i32 block_stride[4];
    i64 k, n, ne2, ne3;  // k counts elements, rounded out to whole blocks
    i32 type;
    i32 repacked;  // 1: a row's planes are dense, and 16-byte aligned
};

// y[n, m, i2, i3] = sum_k w[k, n, i2/r2, i3/r3] * x[k, m, i2, i3]   (ggml_mul_mat), f32 accumulation, y is F32.
// x covers only elements [k_begin, k_end) of w's k axis (row-parallel shards cut inside a block): x.ne[0] = k_end - k_begin,
// and elements of w outside that range count as zero.
struct MulMatArgs {
    Matrix w;
    View x;          // F32 or F16 (or quantised to xq by quantize_x first)
    View y;          // F32
    const char* xq;  // int8 [rows of x][k], null when w is not quantised
    const char* xd;  // float2 {scale, scale * sum of the int8} [rows of x][k/32]
    i64 k_begin, k_end;
    i64 dim2_offset_x;  // global index along dim 2 of x's first local entry; of w's first local entry
    i64 dim2_offset_w;
    i32 ratio2, ratio3;  // broadcast: w's index = x's index / ratio (global)
};

// Up to kVecMatrices products of the same activations x [k, m <= 8]: y_i[n_i, m] = w_i[k, n_i]^T x. xq, xd as in MulMatArgs.
struct MulVecPart {
    Matrix w;
    View y;
};
struct MulVecArgs {
    MulVecPart part[3];
    View x;
    const char *xq, *xd;
    i64 k;
    i32 n_parts, pad;
};
constexpr int kVecRows = 4;  // rows of one matrix that a block computes

// How a product wants its activations: int8 (QuantizeArgs), or panels of halves (mul_wgmma.h).
enum ActivationForm : i32 { kInt8Rows = 0, kHalfPanels = 1, kBf16Panels = 2 };
// An activation as a half is a sixteenth of it: what some models have between their products passes the largest half, 65,504, and one infinity
// makes a column of NaN. 1,048,064 does not pass it; steps below 0.001 are of 1e-6. A product gives it back in F32, exactly.
constexpr float kHalved = 1.0f / 16;
template <int kWeightType>
constexpr float kUnhalved = kWeightType == kBF16 ? 1.0f : 1.0f / kHalved;  // bf16 weights take bf16 activations, as they are
constexpr int kPanelRows = 128, kPanelBytes = kPanelRows * 128;            // rows of 64 halves along k, swizzled as wgmma reads them

// x F32 [k_end - k_begin, rows...] -> int8 [rows][k] and float2 [rows][k/32], zero outside [k_begin, k_end); k is a multiple of 32.
struct QuantizeArgs {  // half_x writes halves to xq: [rows][k], and no xd
    View x;
    char* xq;
    char* xd;
    i64 k, k_begin, k_end;
};

// y[n, m] = w[k, n]^T x with x as halves (f16, or bf16 for bf16 weights) [m][k], zero outside of the shard's part of k.
struct MulTileArgs {
    Matrix w;
    View y;
    const char* xh;
    i64 k, m;
};

// The same for up to three matrices of one type that are multiplied by the same x, as panels (half_panels in quantize.cu).
struct MulWideArgs {
    MulVecPart part[3];
    const char* xh;
    i64 k, m;
    i32 n_parts, pad;
};

// The same where the rows alone may leave multiprocessors idle (mul_few.cu, mul_wgmma.cu). k is divided in n_pieces of `chunks` times 128, whose
// sums, [n_pieces][m][n_rows], sum_pieces adds up where there is more than one. n_rows: of all parts. sums: null where one piece is enough.
// n_stages: of mul_few's ring. made: a kernel in front makes the weights (halve_weights), so they are not there early.
struct MulPiecesArgs {
    MulWideArgs wide;
    float* sums;
    i64 n_rows;
    i32 n_pieces, chunks, n_stages, made;
};

// A part of such a product whose pieces nobody has added up: whoever reads it does. Element [row, column] is the sum of n floats, `piece` apart.
struct Pieces {
    const float* sums;  // of its first row, and the first column
    i64 column, piece;  // floats from one to the next
    i32 n;              // 0: it lies where its view says
    i32 kept;           // is written there too, for others
};

// Rows [row_begin, row_begin + rows) of each matrix of w as f16 [matrices][rows][k]; k a multiple of 8.
struct HalveWeightsArgs {
    Matrix w;
    char* out;
    i64 row_begin, rows;
};

struct BinaryArgs {
    View a, b, y;
};  // y = a op b, b broadcast by repetition over a's shape
struct UnaryArgs {
    View x, y;
    float p0, p1, p2, p3;
};  // scale: x*p0 + p1; clamp: [p0, p1]; leaky_relu: slope p0; xielu: alpha_n, alpha_p, beta, eps
struct GluArgs {
    View a, b, y;
    float alpha, limit;
};  // y = act(a) * b, all of y's shape
struct NormArgs {
    View x, y;
    View weight;
    i32 has_weight;
    float eps;
};  // F32, rows along ne0; weight broadcast
// sums[part * rows + row] = the sum of squares of a rank's elements of a row: of up to four views of as many rows, of any lengths, 0 where there are none.
constexpr int kMostSquares = 4;
struct RowSquaresArgs {
    View x[kMostSquares];
    float* sums;
    i64 rows;
    i32 n_parts, pad;
};
// y = x / sqrt(squares[row] / n + eps) [* weight]: a rank's elements of rows of n, whose sums of squares are all ranks'.
struct NormBySquaresArgs {
    View x, y, weight;
    const float* squares;
    i64 n;
    i32 has_weight;
    float eps;
};
// s = a + b (has_b), y = s / sqrt(mean(s^2) + eps) * weight (has_weight), and y as int8 or panels (xq not null), all rows of ne0; F32, 16-byte aligned.
struct FusedNormArgs {
    View a, b, sum, y, weight;
    char *xq, *xd;
    i32 has_b, has_weight;
    float eps;
    ActivationForm form;  // of xq
};
struct PiecesNormArgs {
    FusedNormArgs norm;
    Pieces a;  // norm.a
};
constexpr int kMostPeers = 16;
// Device memory of one rank, zero at first, that peers write to: launches of pull_norm that a rank has begun, and ended.
struct PeerState {
    u32 arrived[kMostPeers], done[kMostPeers];
    u32 launches, blocks, late, pad;  // of this rank itself: launches before this one, of both kernels; blocks counted of this one; nobody waits any more
};
// A FusedNorm of rows that are sums of all ranks' summands: each rank does the rows [row_begin, row_end) and gives the others what they need of them.
// norm: of this rank's memory, packed rows. norm.b is where it has its summand, norm.a the residual; norm.sum and norm.y are written for its own rows.
struct PullNormArgs {
    FusedNormArgs norm;
    const char* summand[kMostPeers];        // norm.b of every rank
    char *sum[kMostPeers], *y[kMostPeers];  // of the ranks that get every row of them; else null
    char *xq[kMostPeers], *xd[kMostPeers];  // of every rank
    PeerState* state[kMostPeers];           // of every rank
    u32* fault;
    u64 deadline_ns;
    i64 row_begin, row_end;
    i32 rank, n_ranks;
};
// A FusedNorm of few rows that are sums of all ranks' summands: each rank pushes its summand into all ranks' inboxes, its own too, and does all rows.
// An inbox is two by turns of [n_ranks][inbox_words] words {element, number of the launch}: a rank that pushes again has seen all of the last push, so
// everybody has read the one before. norm: of this rank's memory, packed rows; norm.b, or norm.a where there is no residual, is where the summand has its place.
struct PushNormArgs {
    FusedNormArgs norm;
    Pieces summand;          // or it lies in its place
    u64* inbox[kMostPeers];  // of every rank
    i64 inbox_words;
    PeerState* own;
    u32* fault;
    u64 deadline_ns;
    i32 rank, n_ranks;
};
// A GLU whose result is written as F32 and as int8, or panels: rows of k, zero outside of [k_begin, k_begin + glu.y.ne[0]).
struct FusedGluArgs {
    GluArgs glu;
    Pieces a, b;  // of glu.a and glu.b
    char *xq, *xd;
    i64 k, k_begin;
    ActivationForm form;
    i32 pad;
};
enum RopeSections : i32 { kNoSections = 0, kSideBySide = 1, kInterleaved = 2, kVision = 3 };
struct RopeArgs {
    View x, y;     // [head_dim, n_head, n_tokens, 1] F32 or F16
    View pos;      // I32 [n_tokens]; with sections 4 * [n_tokens]
    View factors;  // F32 [n_dims/2]; no data: none
    i32 n_dims, neox, n_ctx_orig;
    i32 n_offs;       // the first of the n_dims elements that turn
    i32 sectioned;    // a RopeSections: pairs take their position from one of four rows
    i32 sections[4];  // pairs of each
    float direction;  // -1 turns back
    i32 heads;        // of a token, that a thread turns one behind the other: rope_heads()
    float freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow;
    float factor;  // of the result: a scale behind the rope
};
struct SoftMaxArgs {
    View x, y, mask, sinks;  // x, y F32 [ne0, rows, n_head, ne3]; mask F16 or F32 [ne0, >=rows, ne2|1, ne3|1]; sinks F32 [n_head]
    i32 has_mask, has_sinks;
    i32 head_offset, n_head_global;  // for ALiBi
    float scale, max_bias;
};
struct FlashAttnArgs {
    View q, k, v, mask, sinks, y;  // q F32 [d, n_tok, n_head, ns]; k, v F16/F32/BF16 [d, n_kv, n_head_kv, ns]; y F32 [dv, n_head, n_tok, ns]
    i32 has_mask, has_sinks;
    i32 head_offset, kv_head_offset, n_head_global, gqa_ratio;  // kv head of local head h = (h + head_offset) / gqa_ratio - kv_head_offset
    float scale, max_bias, logit_softcap;
};
// Flash attention of many tokens: a block has `warps` times 16 rows, which are `heads` query heads of one KV head, of warps * 16 / heads tokens.
struct FlashTileArgs {
    FlashAttnArgs a;
    i32 heads, warps;
};
// A piece of flash attention: cells [split * cells, ...) of one KV head against all its query heads. Per (token, local head, split):
// acc [dv] unscaled, meta {max, sum}. flash_combine adds the splits up. whole: flash_columns does what that would do with one split.
struct FlashSplitArgs {
    FlashAttnArgs a;
    float *acc, *meta;
    i32 n_splits, cells, head_groups, group_heads;  // a unit: group_heads query heads of one KV head
    char *xq, *xd;                                  // whole: as flash_combine's
    ActivationForm form;
    i32 whole;
};
struct FlashCombineArgs {
    View y;  // F32 [dv, n_head, n_tok, ns]
    View sinks;
    const float *acc, *meta;
    char *xq, *xd;  // not null: also in `form`, a row being all heads of a token
    i32 n_splits, has_sinks, head_offset;
    ActivationForm form;
};
struct GetRowsArgs {
    Matrix w;
    View w_view;
    View idx;
    View y;
    u32* fault;
};  // w_view when w is not quantised
// y[:, row] = x[:, i] for row = idx[i]. Where rows themselves are divided (the transposed V cache), a period of row_period rows
// holds this rank's rows [row_begin, row_end) and row r lies at local row r / row_period * (row_end - row_begin) + r % row_period - row_begin;
// others are another rank's and are skipped. row_period = 0: every row is here. A row outside [0, n_rows) is a fault.
struct SetRowsArgs {
    View x;
    View idx;
    View y;
    u32* fault;
    i64 n_rows, row_period, row_begin, row_end;
    i64 block_elems;  // of y's type; with more than 1, x.ne[0] counts blocks
};
// Up to two ropes (Q and K), and up to two tensors' rows stored into the cache. stored_rope: the rope whose result is store[0].x, or -1.
struct RopeStoreArgs {
    RopeArgs rope[2];
    SetRowsArgs store[2];
    i32 n_ropes, n_stores, stored_rope, pad;
};
struct PiecesRopeArgs {
    RopeStoreArgs args;
    Pieces rope[2], store[2];  // what is turned; what is stored as it is
};
struct CopyArgs {
    View x, y;
};  // same number of elements, any F32/F16/BF16/I32 pair, ggml_cpy order
// The same for elements, or blocks, of `bytes` bytes that are moved as they are; ne[0] counts them.
struct CopyUnitsArgs {
    View x, y;
    i32 bytes, pad;
};
// Blocks to plain elements.
struct CopyBlocksArgs {
    Matrix x;
    i64 x_ne[4];
    View y;
};
struct FillArgs {
    View y;
    float value;
};

// An element of y is one of x (or of b), moved as its bytes, or a constant: moves.cu says which for each kernel, and what p means.
struct MoveArgs {
    View x, b, y;
    i32 bytes;
    i32 p[9];
    float value, step;
};
// y = something of a row, or of a group of rows, of x.
struct ReduceArgs {
    View x, y;
    float eps;
    i32 n_groups;
};
// Recurrences over tokens whose state is a matrix per head and sequence: recurrent.cu has the formulas and what src is for each.
struct RecurrentArgs {
    View src[7];
    float *y, *state;  // f32, of this rank's first head, packed: y [state rows, n_head, n_tokens, n_seqs], state [n, state rows, n_head, n_seqs, snapshots]
    i64 n, rows, n_head, n_tokens, n_seqs;                      // n_head: this rank's, whose first is head_begin of all
    i64 n_head_global, head_begin, n_group[2], group_begin[2];  // groups of heads that share B, C, or Q, K: of the sources with even and odd number
    i64 snapshots;                                              // the states after the last so many tokens, latest first
    u32* fault;
    float scale;
    i32 pad;
};
// DeepSeek's indexer: y[cell, token] = sum over heads of max(q.k, 0) * weight, + mask (f16).
struct IndexerArgs {
    View q, weights, mask, y;
    Matrix k;
};
// Hyper-connections (dsv4): x and w by kernel, see hyper.cu.
struct HyperArgs {
    View x, residual, post, comb, y;
    float scale, eps;
    i32 n_iter, flag;
};

/// What kernels bring from pinned memory of the host: `bytes` from `from` to `to`, which no other piece touches.
struct InputPiece {
    const char* from;
    char* to;
    i64 bytes;
};
constexpr int kInputPieces = 16;  // of a launch
struct CopyInputsArgs {
    InputPiece piece[kInputPieces];
};

struct SpinArgs {
    u64 nanoseconds;
};
struct ReadRateArgs {
    const char* x;
    u64 n;
};

// Bytes of one tensor between the host's layout and a shard's planes (see weight_format.h): a byte permutation.
struct RepackArgs {
    char* host;  // staging holding host bytes [offset, offset + bytes) of the tensor
    i64 offset, bytes;
    i64 row_blocks;              // blocks in one row of the whole tensor
    i64 block_begin, block_end;  // this shard's blocks along the row, rounded out
    i64 row_begin, row_end;      // this shard's rows (rows of all matrices counted through, per matrix n_rows)
    i64 n_rows;                  // rows of one matrix of the whole tensor
    char* plane[4];
    i64 row_stride, matrix_stride;
    i32 field_offset[4], field_bytes[4];
    i32 n_fields, block_bytes;
    i32 to_host;  // 0: staging -> planes, 1: planes -> staging
    i32 pad;
};

struct ArgsortArgs {
    View x, y;  // y I32: the first y.ne[0] places of the order of x's rows
    i32 descending, pad;
};
// Rows longer than a block sorts, as runs that are sorted and then merged, several at a time. An entry is a key and its index, all of them
// different. A row's runs of `run` elements have room for min(run, places) entries each: what lies behind is nobody's first.
struct SortRunsArgs {
    View x;
    u64* to;  // [rows][sorted_entries], min(run, places) to a run
    i64 row_begin, rows, places;
    i32 descending, pad;
};
struct MergeRunsArgs {
    View y;           // I32, written by the last pass: `to` is null then
    const u64* from;  // as SortRunsArgs::to
    u64* to;          // the same with runs of run * kMergeRuns
    i64 row_begin, rows, n, places, run;
};
// y[:, j, t] = w[:, :, ids[j, t]]^T x[:, j or 0, t]   (ggml_mul_mat_id): slot j of token t is the work of expert ids[j, t].
// xq, xd, k_begin and k_end as in MulMatArgs, rows of x counted slots first.
struct MulIdArgs {
    Matrix w;  // [k, n, n_expert]
    View x;    // F32 [k_end - k_begin, n_used or 1, n_tokens]
    View ids;  // I32 [n_used, n_tokens]; without data: entries take all experts in turn (a matrix for each head)
    View y;    // F32 [n, n_used, n_tokens]
    const char *xq, *xd;
    i64 k_begin, k_end;
    u32* fault;
};
// Many tokens: what a token's slots want, by expert. An entry is token * n_used + slot.
struct ExpertTile {
    i32 expert, first, count, pad;  // entries[first, first + count), at most `columns`
};
struct GroupArgs {
    View ids;  // I32 [n_used, n_tokens]
    i32* entries;
    ExpertTile* tiles;
    i32* n_tiles;
    i64 n_expert;
    i32 columns, pad;
    u32* fault;
};
struct MulTileIdArgs {
    Matrix w;        // [k, n, n_expert]
    View y;          // F32 [n, n_used, n_tokens]
    const char* xh;  // halves as in MulTileArgs, [n_tokens * n_used or n_tokens][k]
    const i32* entries;
    const ExpertTile* tiles;
    const i32* n_tiles;
    i64 k;
    i32 n_used, x_per_slot;
    i32 n_stages, pad;  // of mul_few's ring
};
// The rows of x that each tile of entries multiplies, as a panel: [tiles][k / 64] of `columns` rows, see half_panels.
struct HalveEntriesArgs {
    View x;  // F32 [k_end - k_begin, n_used or 1, n_tokens]
    char* xh;
    const i32* entries;
    const ExpertTile* tiles;
    const i32* n_tiles;
    i64 k, k_begin, k_end;
    i32 n_used, x_per_slot, columns, pad;
};
constexpr int kVecSlots = 16;  // of a token, a warp each
// What is added to a product of experts: y[:, j, t] = product[:, j, t] + row ids[j, t] of `rows`, F32 as long as the product's. rows null: y is the
// product, as of a Partial's summands one takes the bias; y.data null: there is nothing of this.
struct ExpertBias {
    View y;
    const char* rows;
    i64 row_bytes;
};
// Few tokens: up to two products (gate, up) of the same x and ids, each with a bias or none. And, when `scaled`, of one product what follows the
// experts: products = y (with its bias) * weights, sum[0] = products of slots 0 and 1, sum[i] = sum[i - 1] + products of slot i + 1, for n_sums of them.
struct MulVecIdArgs {
    MulVecPart part[2];
    ExpertBias bias[2];
    View x, ids;
    const char *xq, *xd;
    i64 k;
    u32* fault;
    i32 n_parts, scaled, n_sums, pad;
    View weights;   // F32 [1, n_used, n_tokens]
    View products;  // F32 [n, n_used, n_tokens]; may be y, with its bias or without
    View sum[kVecSlots - 1];
};
// The same behind the products of many tokens: products = x * weights, sum[0] = products of slots 0 and 1, sum[i] = sum[i - 1] + products of slot
// i + 1. Rows of F32 at multiples of 16 bytes; products may be x, a sum may be the sum before it, otherwise all lie apart.
struct WeightedSumArgs {
    View x;                   // F32 [n, n_used, n_tokens]
    View weights;             // F32 [1, n_used, n_tokens]
    View products;            // as x
    View sum[kVecSlots - 1];  // F32 [n, n_tokens]
    i32 n_sums, pad;
};
// Small ops one after another in a single block, which sees what it wrote itself: what a router does for few tokens. And, in the blocks
// behind it, quantising what the experts will read (quantize.xq not null), which does not depend on any of it.
enum class ChainOp : i32 { kAdd, kSub, kMul, kDiv, kScale, kClamp, kSigmoid, kSoftMax, kArgsort, kGetRows, kSumRows, kFill, kSetRows };
struct ChainStep {
    ChainOp op;
    i32 pad;
    View a, b, y;  // b: of the first four, and the rows of kGetRows and kSetRows (those of y, others stay)
    float p0, p1;  // scale: a * p0 + p1; clamp: [p0, p1]; soft max: of a * p0; argsort: descending when p0 is not 0; fill: with p0, and a is y
};
constexpr int kChainMost = 15;  // a router with groups of experts (DeepSeek-V3) has as many
struct ChainArgs {
    ChainStep step[kChainMost];
    QuantizeArgs quantize;
    u32* fault;
    i32 n_steps, pad;
};
static_assert(sizeof(ChainArgs) < 4096 && sizeof(MulVecIdArgs) < 4096, "a kernel's arguments");
// y[:, j, t] = a[:, j, t] + b[:, ids[j, t]] (has_b), else a's copy: of a Partial's summands one takes the bias.
struct AddIdArgs {
    View a, b, ids, y;
    u32* fault;
    i32 has_b, pad;
};

// ---- stream.cu: one persistent kernel that walks a table of stages (see there). Vectors are one token's: F32, contiguous, 16-byte aligned.
constexpr int kStreamWarps = 8;          // that multiply; one more streams weights, one more stores results. 16 had no registers left: what
                                         // spilled came back from the L2, and an 8B model ran at 298 tokens/s (docs/decisions.md)
constexpr int kStreamSlots = 5;          // of the shared-memory ring
constexpr int kStreamSlotBytes = 36864;  // 16 rows of 4096 4-bit weights: 5 of them keep 4 TB/s busy for 5 us (docs/decisions.md)
constexpr int kStreamMostK = 32768;
constexpr int kStreamStageBytes = 1408;

struct StreamPart {
    const char* w;      // row 0
    float *y, *copy;    // copy: for a later stage of the stream, or null
    const float* bias;  // added to what goes to y and copy, or null
    float* raw;         // what it is added to, for whoever else reads it, or null
    i32 n, bias_row;    // rows; of experts, elements from one's bias to the next one's
};
enum StreamInput : i32 { kInputKept = 0, kInputPlain = 1, kInputNorm = 2, kInputHeads = 3 };
// Up to three products of one quantised type and the same activations. A tile is `rows` rows of one part (glu: half of them of part 0, the
// gate, half of part 1, at the same place) in one slot of the ring, one behind the other as in memory: plane f at plane_at[f] of each.
// Input: as the stage before left it in shared memory; `a` quantised; or the norm of s = a + b times weight, quantised, where b may be
// the norm of b times b_weight and the sum be multiplied by *sum_factor; or (kInputHeads) heads' k elements each, at multiples of a_stride from `a` on, quantised.
// Products of experts: one matrix lies behind the other for each expert, and `slots` of them, which the router chose, count.
// kExpertsEach: tiles are rows of one slot's gate and up, or of its only matrix, results lie slot behind slot; kExpertsSum: a tile has its rows of every
// slot, each multiplied by its own [k] of the input. kHeads: as kExpertsSum, but slots are heads, which all count, `slots` of them in a tile and slot_groups of so many,
// and each one's rows are results.
// weighed (Llama 4, one expert a token): the host multiplies the input by the expert's weight. Its int8 are the same without, so the first products' results are
// multiplied instead, and those of the last one have no weight; sum is the input that the host made.
enum StreamExpertsRole : i32 { kExpertsNone = 0, kExpertsEach = 1, kExpertsSum = 2, kHeads = 3 };
struct StreamProduct {
    StreamPart part[3];
    i32 n_parts, type, k, rows;
    // The warps are (1 << k_shift) groups along k x row groups: a lane holds units_each units (32 elements or 64) of the input. kExpertsSum: 1 << k_shift groups
    // of `lanes` lanes share a slot's rows, and a lane has units_each units of that slot's input.
    i32 k_shift, units_each;
    i32 n_tiles, row_bytes;
    i32 first_tile[3];  // of each part; beyond the last: n_tiles
    i32 plane_at[4];
    i32 glu, input;      // glu: 1 + GluOp, or 0
    float alpha, limit;  // of the glu
    float eps;
    i32 n_push;                    // ranks; 0: nobody adds these sums up
    i32 push;                      // of the launch, from 1 on
    const float *a, *b, *weight;   // b, weight: may be null
    const float* b_weight;         // of a norm that b goes through first, of the same eps; null: none
    const float* sum_factor;       // with b_weight, what the sum is multiplied by (one number); null: nothing
    float *sum, *sum_copy, *norm;  // written for others: s twice, its norm; may be null
    float* glu_y;
    i32 slots, role;  // a StreamExpertsRole
    float* glu_copy;  // what glu_y is (without a GLU, part[0].y), for the next product alone: rows of glu_k, results from glu_begin on, else zeros; or null
    u64* inbox[16];   // where this rank's sums go on every rank instead of to y: the all_reduce behind this product
    i32 glu_k, glu_begin;
    i32 lanes, y_stride, glu_stride;  // lanes that share a row of a slot (kExpertsSum); from slot to slot of y, and of glu_y
    i32 expert_rows;                  // from an expert's matrix to the next one's: more than a part's, where one has gates and ups
    i32 slot_groups;                  // kHeads
    i32 piece_shift;                  // rows of a tile's piece, of gates and of ups each where there are both: 1 << piece_shift; all of them: one piece
    i32 in_flight, in_flight_early;   // pieces on their way at most (stream.h, kStreamInFlight), of kStreamPieces a tile
    i32 share;                        // elements of a normed input, of which a block writes what others may read of it
    i32 a_stride;                     // kInputHeads
    u8 map[2];                        // of experts without gates, what becomes of y, one after the other: 1 + a UnaryOp without parameters, or 0
    u8 pad;
    u8 weighed;         // of experts, their one input, not their results: see above
    u32 heads_inverse;  // 2^16 / (k / 8), rounded up
};
constexpr i32 kStreamMostExperts = 512, kStreamMostGroups = 32;
// A router's choice, for one token: of the logits (plus logits_bias) a soft max or sigmoids, of which (plus selection_bias) the n_used largest
// choose the experts (kRouteByLogits: the largest logits, as sigmoids round to 1); their weights are those of the gating (not the biased ones), after
// which another soft max, a division by their sum
// clamped to [least, most] and a scale may follow. Where experts are in n_groups groups of as many neighbours each, only those of the n_groups_used groups
// count of which the two largest numbers that choose add up to most (DeepSeek-V3, arXiv:2412.19437; the order of equal ones is theirs).
// Results for whoever else may read them; null: nobody, or the step is not there.
enum StreamRouteSteps : i32 { kRouteSoftMax = 1, kRouteDivide = 2, kRouteClamp = 4, kRouteScale = 8, kRouteByLogits = 16 };
enum StreamGating : i32 { kGatingNone = 0, kGatingSoftMax = 1, kGatingSigmoid = 2 };
struct StreamRoute {
    const float *logits, *logits_bias, *selection_bias;
    i32 n_expert, n_used, n_order;
    i32 gating, steps;                // a StreamGating, StreamRouteSteps
    i32 n_groups, n_groups_used;      // n_groups 0: none
    i32 visible;                      // any of the results below is
    float scale_before, scale_after;  // of the soft maxes' arguments
    float least, most, factor, shift;
    float *biased, *gated, *selection;                                   // [n_expert]
    i32* group_order;                                                    // [n_groups][experts of one]: the order within each
    float *group_best, *group_sums;                                      // [n_groups][2], [n_groups]
    i32* groups;                                                         // [n_groups]: their order
    float *group_rows, *open;                                            // [n_groups_used][experts of one], [n_expert]: of the others -infinity
    i32* order;                                                          // the first n_order places of all experts' order
    float *chosen, *after, *sum, *clamped_sum, *norms, *scaled_weights;  // [n_used], [1]
};
// What becomes of kExpertsSum's results (y: with their biases): products with the weights, and sums of the first two, three, ... slots' products. The
// last sum is the stage's part[0].y.
struct StreamSums {
    float *y, *products;
    i64 products_stride;  // elements from slot to slot
    float* sum[kVecSlots - 2];
    i64 visible;  // any of them is wanted
};
// What becomes of one part's result where experts have no role in it: times the sigmoid of *gate (null: of nothing), added to what an earlier stage has left.
struct StreamOnto {
    const float *gate, *added;  // added: null: nothing of this
};
struct alignas(16) StreamExperts {
    StreamProduct product;  // first: whoever looks for a product finds it
    union {
        StreamRoute route;  // kExpertsEach
        StreamSums sums;    // kExpertsSum
        StreamOnto onto;    // kExpertsNone
    };
};
// y[i] = sum of w[:, i] * x, rows of floats, where x is `a`, or the norm of s = a + b times weight. sum, sum_copy, norm, norm_copy: for others.
struct StreamFloats {
    const float *w, *a, *b, *weight;
    float *sum, *sum_copy, *norm, *norm_copy, *y, *y_copy;
    i64 k, n, row_stride;  // elements
    float eps;
    i32 has_norm, share;  // share: as a product's
    const float* more_w;  // a row behind the others that lies elsewhere, as its result does; null: there is none
    float* more_y;
};
// y[i] = factor * sum over ranks of inbox[rank][i], in rank order: the same bits on every rank. An inbox has words {sum, number of the push}, which
// are stored and read whole: whoever finds the number that it waits for has the sum too, and no fence and no counter is between them. There
// are two, by turns: a rank that pushes again has seen all of the last push, so everybody has read the one before (persist.cpp, waits_of).
struct StreamReduce {
    const u64* inbox;  // [n_ranks][n]
    float *y, *copy;
    const float* bias;  // as a StreamPart's
    float* raw;
    i64 n;
    i32 n_ranks, push;
    float factor;  // of the sum
    i32 pad;
};
struct StreamCopy {
    const float* from;
    float* to;
    i64 n;
};
// The turns of every pair of a token's heads, the same in all layers: {cos, sin} of pair i at table[2 * i].
struct StreamTurns {
    RopeArgs rope;
    float* table;
};
struct StreamRope {
    RopeStoreArgs args;
    const float* table[2];  // of each rope
};
struct StreamNormRows {
    FusedNormArgs norm;
    float* copy;   // of the only row's result, if it is long, for a later stage, or null
    float factor;  // of y
    i32 pad;
};
// y = (x - mean) / sqrt(mean of (x - mean)^2 + eps) * weight + bias, of each row. weight, bias: of a row's elements, or null. Of one row, with added not null,
// x + added instead of x, which sum keeps.
struct StreamLayerNorm {
    View x, y;
    const float *weight, *bias, *added;
    float* sum;
    float eps;
    i32 pad;
};
// RowSquaresArgs and NormBySquaresArgs of one row, F32, at multiples of 16 bytes.
struct StreamSquares {
    const float* x[kMostSquares];
    i64 n[kMostSquares];
    float* sums;
    u64* inbox[16];  // as a StreamProduct's
    i32 n_parts, n_push, push, pad;
};
struct StreamNormBySquares {
    const float *x, *weight, *squares;
    float *y, *copy;  // copy: for a later stage, or null
    i64 n;            // elements of this rank
    i64 whole;        // of all ranks
    float eps;
    i32 pad;
};
struct StreamBinary {
    BinaryArgs args;
    i32 op, pad;     // elementwise.h's BinaryOp
    float* copy;     // of a vector's result, for a later stage of the stream, or null
    u64* inbox[16];  // as a StreamProduct's: of a vector whose parts are all ranks'
    i32 n_push, push;
};
struct StreamGlu {
    GluArgs args;
    i32 op, pad;  // activation.h's GluOp
};
// y = x after up to six ops, element by element: a UnaryOp of it with its parameters, or kStreamWithOther + a BinaryOp of it and an element of b.
// With w it is not x but what a window of it is by w (SSM_CONV).
constexpr i32 kStreamWithOther = 100;
constexpr int kStreamElementSteps = 6;
struct StreamElements {
    View x, y, w;
    struct Step {
        View b;
        float p[4];
        i32 op, pad;
    } step[kStreamElementSteps];
    i32 n_steps, packed;  // packed: all views but w have y's elements side by side in y's order
};
struct StreamConcat {
    MoveArgs args;
};
struct StreamDelta {
    RecurrentArgs args;  // recurrent.h, delta_in_fours, or of a kStreamScan scan_in_fours
};
// Channels of a window over tokens: of the last taps - 1 of them, which a row of a cache has, and of this one.
struct StreamWindow {
    const float *x, *w;  // [channels]; [taps, channels]
    const char* old;     // [taps - 1, channels] of the cache's row 0
    float* to;           // where the same goes for the next token; maybe the row that it is read from
    i64 n_channels;
};
struct StreamWindowRow {  // the cache's row of this token's sequence
    const i32* row;
    i64 row_bytes;
    i32 n_rows, taps;
};
constexpr i32 kStreamMostTaps = 4;
// An op on a float of each head: a UnaryOp (stream.h, stream_head_op), or kStreamWithOther + kAdd or kMul of it and b[head].
struct StreamHeadStep {
    const float* b;
    i32 op, pad;
};
constexpr int kStreamHeadSteps = 4;
struct StreamHeadFloat {
    const float* x;  // of head h at x[h / inner * outer + h % inner * stride]
    StreamHeadStep step[kStreamHeadSteps];
    i32 n_steps, inner, outer, stride;
};
// Whose row of Q or K a head has: head / repeat % groups, counted from `first` on.
struct StreamHeadGroup {
    i32 repeat, groups, first;
    float eps, factor;  // of the row's norm, which has no weights
};
// All that a token does in linear attention (GATED_DELTA_NET) between its products, a block a head: y = the norm of what its state [n, rows] answers, times
// weight, times z after an op. The state of one sequence is read from a row of a cache and written to one. Q, K and V come out of windows, which other blocks
// read too: so another stage, behind a wait, brings the window of an earlier one up to date (shift), where there is one.
// With a not null it is a state space's step (SSM_SCAN), of whose C, B and x the windows are: gate is dt without its softplus, y = (what the state answers
// + d * x) * silu(z).
struct StreamHeads {
    StreamWindow window[3];  // of Q, K and V
    StreamWindow shift[3];
    StreamWindowRow row, shift_row;
    StreamHeadGroup group[2];  // of Q and K
    StreamHeadFloat gate, beta;
    const float *z, *weight;
    float* y;
    const char* state;
    float* state_to;
    const i32* state_row;
    i64 state_row_bytes;
    u32* fault;
    i32 n_state_rows, n_shift;
    i32 n_head, head_begin, n, rows;  // n_head: this rank's; 0: shifts alone
    i32 z_op, z_stride;               // a UnaryOp; elements from head to head
    float eps, scale;
    const float *a, *d, *bias[3];  // [n_head], [n_head], of the windows' channels or null
};
constexpr int kStreamScanRows = 128, kStreamScanElems = 256;  // of a head's state, at most
struct StreamCombine {
    FlashCombineArgs args;
    u32 chunks_inverse, pad;  // 2^16 / pieces of 32 elements of a head, rounded up
};
// What an attention does with its token's own query, key and value heads, as a product has left them: it turns the queries, and the block that
// has the token's cell (of units that share a KV head, the first one's) writes key and value into the cache. Query and key as turned go to q_y and k_y too, for
// whoever else may read them (null: what this attention writes lies there).
struct StreamOwnToken {
    struct Cache {  // F16 rows
        char* data;
        const char* row;               // its number, I64 or I32
        i64 row_bytes, n_rows, first;  // first: the row that the attention's cell 0 is
        i32 row_type, pad;
    };
    const float *q, *k, *v;
    float *q_y, *k_y;
    const float* table;            // of StreamTurns; null: there is nothing of this here
    const float *q_norm, *k_norm;  // weights of the heads' norms, which come before the turns; null: there are none
    float q_eps, k_eps;
    Cache k_cache, v_cache;    // without a table: whose rows an earlier stage of the launch writes; row null: none does
    u32* fault;                // a row outside of a cache
    i32 n_dims, n_offs, neox;  // multiples of 8, with neox of 16 and 8
    u32 width_inverse;         // of a quarter of a head's size, as below
    i32 q_stride;              // elements from query to query: there may be others between them
    i32 v_normed;              // V's heads have a norm too, of k_eps and without weights (Gemma 4)
};
// Of a long cache the streaming warp brings K and V through the ring, as it does weights, ahead of the stage: a tile is groups * 16 cells of a
// unit's KV heads, their K in one slot, V in the next, a row of either at multiples of k_stride, v_stride bytes there. Groups whose cells are all masked
// are not brought. The token's own cell comes otherwise (StreamOwnToken): it is written while tiles are on their way already.
struct StreamCells {
    const char *k, *v;                                     // of cell 0 and KV head 0 here; heads side by side; v null: units share the one row of a cell
    const char* mask;                                      // F16 of each cell; null: every cell counts
    i64 k_row, v_row;                                      // bytes from cell to cell
    i32 n_cells, n_heads, unit_heads, head_bytes;          // n_cells a multiple of 16; KV heads here, of a unit at most
    i32 n_units, n_splits, split_cells;                    // unit u of piece s is number s * n_units + u
    i32 groups, k_stride, v_stride;                        // groups: a power of two, or 0: not streamed; without v: k_stride is four rows'
    i32 most_in_flight;                                    // pieces of tiles
    u32 units_inverse, sets_inverse, head_groups_inverse;  // 2^16 / n_units, warps of a group, args.head_groups, rounded up
};
// Latent attention (kStreamLatentHeads heads a unit, whose cells are one row each for all of them, and come through the ring): where queries and the token's own
// cell come from. Without `table` both are in memory whole (cache.row null: no stage writes a cell); else a query is n_plain elements that a product has left and
// then those that this stage turns, and the own cell is the norm of kv times weight and then k_pe turned, which a block of the first heads writes into the cache.
struct StreamLatent {
    const float *q, *q_pe, *kv, *k_pe, *weight, *table;
    StreamOwnToken::Cache cache;
    u32* fault;                          // a row outside of the cache
    i32 n_plain, q_stride, q_pe_stride;  // elements; strides from head to head
    i32 n_turned, neox;
    float eps;
    i32 used;  // 0: this is no latent attention
};
struct StreamFlash {
    StreamCells cells;  // first: all that the streaming warp looks at
    FlashSplitArgs args;
    StreamOwnToken own;
    StreamLatent latent;
    View y;  // where one piece is all cells (args.n_splits = 1): F32 [d, n_head], and no combination follows; else no data
    i32 n_units;
    float q_factor;  // of own.q_y; of the queries the attention's scale has it
};
enum StreamKind : i32 {
    kStreamProduct,
    kStreamReduce,
    kStreamCopy,
    kStreamNormRows,
    kStreamBinary,
    kStreamTurns,
    kStreamRopeStore,
    kStreamSetRows,
    kStreamGetRows,
    kStreamFlash,
    kStreamCombine,
    kStreamFloats,
    kStreamGlu,
    kStreamElements,
    kStreamConcat,
    kStreamDelta,
    kStreamHeads,
    kStreamLayerNorm,
    kStreamSquares,
    kStreamNormBySquares,
    kStreamScan,
};
struct StreamStage {
    i32 kind;
    u16 wait;  // for all blocks of this rank to have done all stages before
    u16 turn;  // the block at which a stage of elements or rows begins
    // Blocks of 256 of a kStreamRopeStore; of a kStreamGetRows, whether whole rows of floats are copied; of a kStreamNormRows, whether rows are norm_head's.
    i32 count;
    i32 next_product;  // index of the next stage that is one or streams a cache, or n_stages: the streaming warp goes from one to the other
    alignas(16) char body[kStreamStageBytes - 16];
};
// Device memory of one rank, zero at first: how many blocks have arrived at how many stages, how many have ended; and the pushes of all
// launches before this one.
struct StreamState {
    u32 arrived, done, pushed_before;
    u32 pad[29];
};
struct StreamArgs {
    const StreamStage* stages;
    StreamState* state;
    u32* fault;
    i32 n_stages, first_product, n_pushes;  // pushes of this launch
    i32 slots;                              // of the ring (stream.h, stream_slots)
    i64 inbox_words;                        // of one of the two inboxes
    u64 deadline_ns;
    u64* cycles;  // [n_stages][kStreamTimes]: of the multiprocessor of block 0, for whoever asks where a token's time goes
};
enum StreamTime : i32 { kTimeBegin, kTimeWaited, kTimeInput, kTimeDone, kTimeStored, kStreamTimes };

enum Fault : u32 { kFaultNone = 0, kFaultRowIndex = 1, kFaultKvCell = 2, kFaultExpert = 3, kFaultLatePeer = 4 };

}  // namespace ggml_tp
