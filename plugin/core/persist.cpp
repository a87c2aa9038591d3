#include "persist.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <set>

#include "chain.h"
#include "delta_heads.h"
#include "draft.h"
#include "elementwise.h"
#include "flash_attn.h"
#include "latent_heads.h"
#include "mul_vec.h"
#include "mul_vec_id.h"
#include "norm.h"
#include "recurrent.h"
#include "rope.h"
#include "shared_expert.h"

namespace ggml_tp {
namespace {

constexpr int kAttributeCooperative = 95;                 // CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
constexpr int kAttributeSharedOptIn = 97;                 // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
constexpr i64 kLeastCells = kStreamWarps * kColumnsStep;  // of a piece of attention: a step for every warp
constexpr i32 kWholeHeads = 4;  // query heads of a unit of one piece: eight took 11,200 cycles a layer at 64 cells, two fours 8,700 (Qwen3-30B-A3B)
constexpr i64 kWholeCells = kStreamWarps * kColumnsRun;  // up to here one piece: to combine pieces costs more than four steps of its warps
constexpr i64 kMostCells =
    8192;  // where cells cannot be streamed: at 32768 a kernel per step is ahead (8B, Q4_0, one H100: 228 tokens/s, 200), at 256 behind (403, 448)
constexpr i64 kMostElems = 1 << 17;   // of an element-wise stage: more is no token's work
constexpr i64 kMostCopied = 1 << 22;  // of one that copies what lies side by side: a sequence's states
// Of a run, a dense layer's: two between the launches of experts lose (Qwen3-30B-A3B, Q4_K, H100: one rank 253 tokens/s without, 223; two 248, 218).
constexpr size_t kLeastProducts = 4;
constexpr size_t kTurn = 29;  // blocks, by which a stage of little work begins behind the one before
constexpr i64 kAlign = 256;
i64 round_up(i64 value, i64 to) { return (value + to - 1) / to * to; }

// StreamMemory::Rank::vectors. A norm reads its residual and what is added to it in every block, while fast blocks store results already,
// maybe where the host's allocator has put them: over the inputs, which are dead by then. So norms read copies that are nobody else's.
enum Vector {
    kSum0,
    kSum1,
    kAdded0,
    kAdded1,
    kAdded2,
    kImportA,
    kImportB,
    kTurned0,
    kTurned1,
    kTurned2,
    kNormed,
    kLogits,
    kGlu,
    kPacked,
    kWindow0,
    kWindow1,
    kAttended,
    kShared,
    kTables,
    kVectors
};
constexpr i64 kMostTables = 4, kTableFloats = kStreamMostK / kMostTables;  // kinds of rope in one program

struct Stage {
    std::string label;
    bool reduces = false;  // waits for what peers push
};

/// A token's activations on their way to a product: how its input comes about. Bound to the scratch memory that a launch of its own would
/// have written them to as int8.
struct Recipe {
    i32 input = kInputKept;
    const float *a = nullptr, *b = nullptr, *weight = nullptr;
    float *sum = nullptr, *norm = nullptr;
    float eps = 0;
    i64 k = 0;
    bool used = false;  // a second reader finds the int8 in shared memory, or runs as a launch of its own
};

bool named(const RankLaunch& l, const char* prefix) { return l.launch.kernel && std::strncmp(l.launch.kernel, prefix, std::strlen(prefix)) == 0; }

bool is(const RankLaunch& l, const char* kernel) { return l.launch.kernel && std::strcmp(l.launch.kernel, kernel) == 0; }
/// One rank's reading of a run of steps. add() is called with the steps in order; false: this step ends the run (and this object is of no
/// more use: the run is read again up to here).
class RankRun {
  public:
    RankRun(const StreamMemory::Rank& memory, int n_ranks) : memory_(&memory), n_ranks_(n_ranks) {}

    std::vector<Draft> stages;  // what has been drafted; a step adds none, one or more
    bool cautious = false;      // the next step does only what it could do wherever a host's allocator puts things

    bool add(const RankLaunch& l) {
        if (!l.launch.kernel) return true;  // another rank's bias, of what is a Partial
        // Pieces are of products of several columns. By their whole names, where there is one kernel: another may begin like it.
        if (is(l, "rope_store_pieces")) return false;
        if (is(l, "fused_norm")) return add_norm(args_of<FusedNormArgs>(l));
        if (is(l, "quantize_x")) return add_quantize(args_of<QuantizeArgs>(l));
        if (named(l, "fused_glu_")) return add_glu(l);
        if (named(l, "mul_vec_id_")) return add_experts(args_of<MulVecIdArgs>(l));
        if (named(l, "mul_vec_f32_")) return add_floats(args_of<MulVecArgs>(l), true);
        if (is(l, "mul_mat_f32_1")) return add_one_row(args_of<MulMatArgs>(l));
        if (named(l, "mul_vec_") && l.args.size() == sizeof(MulVecArgs)) return add_product(args_of<MulVecArgs>(l));
        if (is(l, "chain")) return add_router(args_of<ChainArgs>(l));
        if (named(l, "flash_columns_")) return add_flash(args_of<FlashSplitArgs>(l));
        if (named(l, "flash_latent_")) return add_latent(args_of<FlashSplitArgs>(l));
        if (is(l, "flash_combine")) return add_combine(args_of<FlashCombineArgs>(l));
        if (named(l, "rope_")) return add_rope(l);
        if (is(l, "set_rows")) return add_set_rows(args_of<SetRowsArgs>(l));
        if (is(l, "get_rows")) return add_get_rows(args_of<GetRowsArgs>(l));
        if (named(l, "binary_")) return add_binary(l);
        if (named(l, "unary_")) return add_unary(l);
        if (is(l, "rms_norm")) return add_rms_norm(args_of<NormArgs>(l));
        if (is(l, "copy")) return add_copy(args_of<CopyArgs>(l));
        if (is(l, "repeat")) return add_repeat(args_of<MoveArgs>(l));
        if (is(l, "concat")) return add_concat(args_of<MoveArgs>(l));
        if (is(l, "ssm_conv")) return add_conv(args_of<BinaryArgs>(l));
        if (is(l, "gated_delta_net")) return add_delta(args_of<RecurrentArgs>(l));
        return false;
    }
    /// The all_reduce of what the last stage, a product or a sum, has computed: push number `push` of the launch. inboxes: of every rank.
    bool add_reduce(DevicePtr y, i64 elems, const std::vector<u64*>& inboxes, int rank, int push) {
        if (stages.empty() || elems > kStreamMostK) return false;
        Draft& last = stages.back();
        auto pushes = [&](auto stage) {
            stage.n_push = n_ranks_, stage.push = push;
            for (int r = 0; r < n_ranks_; ++r) stage.inbox[r] = inboxes[static_cast<size_t>(r)] + rank * elems;
            last.set(stage);
        };
        if (last.kind == kStreamProduct) {
            const StreamProduct p = last.get<StreamProduct>();
            if (p.n_parts != 1 || p.glu || p.part[0].n != elems || reinterpret_cast<DevicePtr>(p.part[0].y) != y) return false;
            pushes(p);
        } else if (last.kind == kStreamBinary) {  // of experts and the one that all tokens share
            const StreamBinary b = last.get<StreamBinary>();
            if (!is_vector(b.args.y, elems) || reinterpret_cast<DevicePtr>(b.args.y.data) != y) return false;
            pushes(b);
        } else {
            return false;
        }
        std::vector<Span>& writes = last.writes;
        writes.erase(std::remove_if(writes.begin(), writes.end(), [&](const Span& s) { return s.begin == y; }), writes.end());
        StreamReduce reduce{inboxes[static_cast<size_t>(rank)], reinterpret_cast<float*>(y), nullptr, nullptr, nullptr, elems, n_ranks_, push};
        Draft d = Draft::of(kStreamReduce, reduce);
        d.writes = {span_of(reduce.y, elems * 4)};
        stages.push_back(std::move(d));
        return true;
    }
    /// What a product's blocks write of their input for others, and what they write at last, may lie in the same memory, when the host's
    /// allocator gives a result what nobody reads any more: a slow block's norm would come to lie over a fast block's results.
    void leave_out_dead() {
        for (Draft& d : stages) {
            if (d.kind != kStreamProduct) continue;
            StreamProduct p = d.get<StreamProduct>();
            std::vector<Span> results;
            const i64 before = p.role == kExpertsSum ? 0 : slots_before(p);  // of other slots
            for (int i = 0; i < p.n_parts; ++i) results.push_back(span_of(p.part[i].y, (before + p.part[i].n) * 4));
            const i64 glu_before = p.role == kExpertsEach ? (p.slots - 1) * p.glu_stride : 0;
            if (p.glu) results.push_back(span_of(p.glu_y, (glu_before + p.part[0].n) * 4));
            for (StreamPart& part : p.part) {
                if (!part.raw) continue;
                const Span raw = span_of(part.raw, (before + part.n) * 4);
                if (meet({raw}, results)) part.raw = nullptr;
                else results.push_back(raw);
            }
            for (float** written : {&p.sum, &p.norm})
                if (*written && meet({span_of(*written, static_cast<i64>(p.k) * 4)}, results)) *written = nullptr;
            d.set(p);
            if (p.role == kExpertsSum) {
                StreamExperts experts = d.get<StreamExperts>();
                Span after = span_of(p.part[0].y, p.part[0].n * 4);
                for (size_t i = std::size(experts.sums.sum); i-- > 0;) {
                    float*& sum = experts.sums.sum[i];
                    if (!sum) continue;
                    const Span here = span_of(sum, p.part[0].n * 4);
                    if (here.meets(after)) sum = nullptr;
                    else after = here;
                }
                d.set(experts);
            }
            if (p.role == kExpertsEach) {
                StreamExperts experts = d.get<StreamExperts>();
                std::vector<Result> routed = results_of(experts.route);
                for (size_t i = 0; i < routed.size(); ++i) {
                    bool dead = meet({routed[i].span()}, results);
                    for (size_t j = i + 1; j < routed.size(); ++j) dead |= routed[i].span().meets(routed[j].span());
                    if (dead) *routed[i].at = nullptr;
                }
                d.set(experts);
            }
        }
    }
    /// What a stage writes for whoever else may read it is left out where nobody does: a later stage of the run writes all of that memory anew, and none
    /// before it reads of it. What a launch behind the run or the host reads stays, as no stage writes over it.
    void leave_out_unread() {
        std::vector<std::vector<Span>> written(stages.size());  // what is left out of a stage is only looked for in those behind it
        for (size_t i = 0; i < stages.size(); ++i) written[i] = written_whole(stages[i]);
        for (size_t i = 0; i < stages.size(); ++i) {
            for (const Result& result : optional_results(i)) {
                const Span span = span_of(*result.at, result.elems * 4);
                const auto reads = [&](const Draft& d) { return std::any_of(d.reads.begin(), d.reads.end(), [&](const Span& s) { return s.meets(span); }); };
                for (size_t j = i + 1; j < stages.size() && !reads(stages[j]); ++j) {
                    if (std::none_of(written[j].begin(), written[j].end(), [&](const Span& s) { return s.begin <= span.begin && span.end <= s.end; })) continue;
                    forget(i, result);
                    break;
                }
            }
        }
    }
    /// Whether what a join's stages no longer write was theirs alone: it is all written over later, and not read before.
    bool is_own(const Join& join) const {
        return std::all_of(join.left.begin(), join.left.end(), [&](const std::pair<size_t, Span>& result) {
            std::vector<Span> rest = {result.second};
            for (size_t i = result.first + 1; i < stages.size() && !rest.empty(); ++i) {
                if (join.takes(i)) continue;
                const Draft* const change = join.change_of(i);
                if (!change && meet(rest, stages[i].reads)) return false;
                for (const Span& written : written_whole(change ? *change : stages[i])) rest = without(rest, written);
            }
            return rest.empty();
        });
    }
    void apply(const Join& join) {
        for (const auto& [i, draft] : join.changed) stages[i] = draft;
        for (size_t j = join.taken.size(); j-- > 0;) stages.erase(stages.begin() + static_cast<std::ptrdiff_t>(join.taken[j]));
    }
    std::optional<DeltaHeads> heads_of(size_t delta, int turn) const {
        return delta_heads(stages, delta, memory_->vectors[kWindow0 + turn], memory_->vectors[kAttended]);
    }
    std::optional<Join> latent_heads_of(size_t i) const { return latent_heads(stages, i, memory_->vectors[kPacked], memory_->vectors[kAttended]); }
    std::optional<Join> shared_expert_of(size_t i) const { return shared_expert(stages, i, memory_->vectors[kShared], memory_->n_blocks); }
    /// When all that is left out is left out.
    void mark_visible() {
        for (Draft& d : stages) {
            if (d.kind == kStreamElements) {
                StreamElements e = d.get<StreamElements>();
                e.packed = !e.w.data && is_dense(e.x) && is_dense(e.y);
                for (int i = 0; i < e.n_steps; ++i)
                    if (e.step[i].op >= kStreamWithOther) e.packed &= is_dense(e.step[i].b) && std::equal(e.y.ne, e.y.ne + 4, e.step[i].b.ne);
                d.set(e);
                continue;
            }
            if (d.kind != kStreamProduct) continue;
            if (const i32 role = d.get<StreamProduct>().role; role != kExpertsEach && role != kExpertsSum) continue;
            StreamExperts experts = d.get<StreamExperts>();
            if (experts.product.role == kExpertsEach) {
                for (const Result& result : results_of(experts.route)) experts.route.visible |= *result.at != nullptr;
            } else {
                StreamSums& sums = experts.sums;
                sums.visible =
                    sums.y || sums.products || std::any_of(std::begin(sums.sum), std::end(sums.sum), [](const float* sum) { return sum != nullptr; });
            }
            d.set(experts);
        }
    }
    // An attention waits for its combination, or a router and its experts' gate and up for what follows: no place to end a run at.
    bool pending = false;
    i64 scratch_bytes = 0;  // of attention's pieces; offsets into it stand in the drafts until set_scratch
    void set_scratch(DevicePtr base) {
        for (Draft& d : stages) {
            auto move = [&](const float*& p) { p = reinterpret_cast<const float*>(base + reinterpret_cast<u64>(p)); };
            if (d.kind == kStreamFlash) {
                StreamFlash f = d.get<StreamFlash>();
                const float *acc = f.args.acc, *meta = f.args.meta;
                move(acc), move(meta);
                f.args.acc = const_cast<float*>(acc), f.args.meta = const_cast<float*>(meta);
                d.set(f);
                d.writes.push_back(span_of(acc, flash_split_acc(f.args) * 4));
                d.writes.push_back(span_of(meta, flash_split_meta(f.args) * 4));
            } else if (d.kind == kStreamCombine) {
                StreamCombine c = d.get<StreamCombine>();
                move(c.args.acc), move(c.args.meta);
                d.set(c);
                const i64 heads = c.args.y.ne[1] * c.args.n_splits;
                d.reads.push_back(span_of(c.args.acc, heads * c.args.y.ne[0] * 4));
                d.reads.push_back(span_of(c.args.meta, heads * 8));
            }
        }
    }

  private:
    /// Elements of a product's results before the last slot's.
    static i64 slots_before(const StreamProduct& p) { return p.role ? (p.slots * std::max<i64>(p.slot_groups, 1) - 1) * p.y_stride : 0; }
    /// A pointer within a stage's body to F32 or I32 elements that it writes.
    struct Result {
        void** at;
        i64 elems;
        Span span() const { return *at ? span_of(*at, elems * 4) : Span{0, 0}; }
    };
    /// Pointers that a stage may do without; into its body.
    std::vector<Result> optional_results(size_t i) {
        std::vector<Result> out;
        auto add = [&](auto*& p, i64 elems) {
            if (p) out.push_back({reinterpret_cast<void**>(&p), elems});
        };
        if (stages[i].kind == kStreamProduct) {
            auto& p = *reinterpret_cast<StreamProduct*>(stages[i].body.data());
            const i64 before = slots_before(p);
            add(p.sum, p.k), add(p.norm, p.k);
            for (StreamPart& part : p.part) add(part.raw, before + part.n);
            if (p.glu) {
                for (int part = 0; part < 2; ++part) add(p.part[part].y, before + p.part[part].n);
                if (p.glu_copy) add(p.glu_y, (p.slots - 1) * static_cast<i64>(p.glu_stride) + p.part[0].n);
            }
            if (p.role == kExpertsEach)
                for (const Result& result : results_of(reinterpret_cast<StreamExperts*>(stages[i].body.data())->route))
                    if (*result.at) out.push_back(result);
            if (p.role == kExpertsSum) {
                StreamSums& sums = reinterpret_cast<StreamExperts*>(stages[i].body.data())->sums;
                add(sums.y, before + p.part[0].n);
                add(sums.products, (p.slots - 1) * sums.products_stride + p.part[0].n);
                for (float*& sum : sums.sum) add(sum, p.part[0].n);
            }
        } else if (stages[i].kind == kStreamReduce) {
            auto& r = *reinterpret_cast<StreamReduce*>(stages[i].body.data());
            add(r.raw, r.n);
        } else if (stages[i].kind == kStreamFloats) {
            auto& f = *reinterpret_cast<StreamFloats*>(stages[i].body.data());
            add(f.sum, f.k), add(f.norm, f.k);
            if (f.y_copy) add(f.y, f.n);
        } else if (stages[i].kind == kStreamFlash) {
            auto& f = *reinterpret_cast<StreamFlash*>(stages[i].body.data());
            const i64 d = f.args.a.q.ne[0];
            add(f.own.q_y, d * f.args.a.q.ne[2]), add(f.own.k_y, d * f.args.a.k.ne[2]);
        }
        return out;
    }
    /// Memory of which a stage writes every byte.
    static std::vector<Span> written_whole(const Draft& d) {
        std::vector<Span> out;
        auto add = [&](const void* p, i64 elems) {
            if (p) out.push_back(span_of(p, elems * 4));
        };
        auto add_view = [&](const View& y) {
            if (is_dense(y)) add(y.data, n_elements(y));
        };
        if (d.kind == kStreamProduct) {
            const StreamProduct p = d.get<StreamProduct>();
            add(p.sum, p.k), add(p.norm, p.k);
            const bool slots = p.role == kExpertsEach, dense = (!slots && p.role != kHeads) || p.y_stride == p.part[0].n;
            const i64 all = slots ? p.slots : p.role == kHeads ? p.slots * p.slot_groups : 1;
            for (int i = 0; i < p.n_parts && dense && !p.n_push; ++i) add(p.part[i].y, p.part[i].n * all);
            if (p.glu && (!slots || p.glu_stride == p.part[0].n)) add(p.glu_y, p.part[0].n * (slots ? p.slots : 1));
            if (slots) {
                StreamRoute route = d.get<StreamExperts>().route;
                for (const Result& result : results_of(route)) add(*result.at, result.elems);
            }
            if (p.role == kExpertsSum) {
                const StreamSums sums = d.get<StreamExperts>().sums;
                const i64 n = p.part[0].n;
                if (p.y_stride == n) add(sums.y, n * p.slots);
                if (sums.products_stride == n) add(sums.products, n * p.slots);
                for (const float* sum : sums.sum) add(sum, n);
            }
        } else if (d.kind == kStreamReduce) {
            const StreamReduce r = d.get<StreamReduce>();
            add(r.y, r.n);
        } else if (d.kind == kStreamFloats) {
            const StreamFloats f = d.get<StreamFloats>();
            add(f.sum, f.k), add(f.norm, f.k), add(f.y, f.n), add(f.more_y, 1);
        } else if (d.kind == kStreamFlash) {
            const StreamFlash f = d.get<StreamFlash>();
            if (f.y.data && is_packed(f.y, f.y.ne[0] * f.y.ne[1])) add(f.y.data, f.y.ne[0] * f.y.ne[1]);
        } else if (d.kind == kStreamCombine) {
            add_view(d.get<StreamCombine>().args.y);
        } else if (d.kind == kStreamCopy) {
            const StreamCopy c = d.get<StreamCopy>();
            add(c.to, c.n);
        } else if (d.kind == kStreamNormRows) {
            add_view(d.get<StreamNormRows>().norm.y);
        } else if (d.kind == kStreamRopeStore) {
            const RopeStoreArgs r = d.get<StreamRope>().args;
            for (int i = 0; i < r.n_ropes; ++i) add_view(r.rope[i].y);
        } else if (d.kind == kStreamBinary) {
            const StreamBinary b = d.get<StreamBinary>();
            if (!b.n_push) add_view(b.args.y);
        } else if (d.kind == kStreamGlu) {
            add_view(d.get<StreamGlu>().args.y);
        } else if (d.kind == kStreamGetRows && d.count) {
            add_view(d.get<GetRowsArgs>().y);
        } else if (d.kind == kStreamElements) {
            add_view(d.get<StreamElements>().y);
        } else if (d.kind == kStreamConcat) {
            add_view(d.get<StreamConcat>().args.y);
        } else if (d.kind == kStreamDelta) {
            const RecurrentArgs r = d.get<StreamDelta>().args;
            add(r.y, r.rows * r.n_head);
            if (r.snapshots > 0) add(r.state, r.rows * r.n * r.n_head);
        }
        return out;
    }
    static std::vector<Span> without(const std::vector<Span>& spans, const Span& cut) {
        std::vector<Span> out;
        for (const Span& s : spans) {
            if (!s.meets(cut)) {
                out.push_back(s);
                continue;
            }
            if (s.begin < cut.begin) out.push_back({s.begin, cut.begin});
            if (cut.end < s.end) out.push_back({cut.end, s.end});
        }
        return out;
    }
    /// The stage no longer writes it.
    void forget(size_t i, const Result& result) {
        const Span span = result.span();
        *result.at = nullptr;
        std::vector<Span>& writes = stages[i].writes;
        // Not if another result of the stage lies there.
        for (const Result& other : optional_results(i))
            if (other.span().meets(span)) return;
        writes.erase(std::remove_if(writes.begin(), writes.end(), [&](const Span& s) { return s.begin == span.begin && s.end == span.end; }), writes.end());
    }

    bool add_norm(const FusedNormArgs& n) {
        const i64 k = n.y.ne[0];
        if (!n.xq) {
            Draft d = Draft::of(kStreamNormRows, StreamNormRows{n, 1.0f, 0});
            auto fours = [](const View& v) {
                return v.nb[0] == 4 && (reinterpret_cast<u64>(v.data) | static_cast<u64>(v.nb[1] | v.nb[2] | v.nb[3])) % 16 == 0;
            };
            d.count = k < kStreamLongRow && k % 4 == 0 && !n.has_b && fours(n.a) && fours(n.y) && (!n.has_weight || fours(n.weight));
            d.reads = {span_of(n.a)};
            d.writes = {span_of(n.y)};
            if (n.has_b) d.reads.push_back(span_of(n.b)), d.writes.push_back(span_of(n.sum));
            // Before a rope that it has nothing to do with: Q's norm, rope, K's norm, rope become norms and ropes.
            const auto at = !stages.empty() && independent(d, stages.back()) && stages.back().kind == kStreamRopeStore ? stages.end() - 1 : stages.end();
            stages.insert(at, std::move(d));
            return true;
        }
        if (!is_vector(n.y, k) || !is_vector(n.a, k) || (n.has_b && (!is_vector(n.b, k) || !is_vector(n.sum, k)))) return false;
        return bind(n.xq, recipe_of(n));
    }
    bool add_quantize(const QuantizeArgs& q) {
        const i64 n = n_elements(q.x);
        if (q.k_begin != 0 || q.k_end != q.k || q.x.type != kF32 || n > kStreamMostK) return false;
        Recipe r;
        r.input = kInputPlain, r.a = reinterpret_cast<const float*>(q.x.data), r.k = n;
        if (!is_vector(q.x, q.k)) {  // heads' parts, one behind the other
            if (!is_dense(q.x)) {
                if (pending) return false;
                r.a = memory_->vectors[kPacked];
                StreamElements e{};
                e.x = e.y = q.x;
                e.y.data = reinterpret_cast<char*>(memory_->vectors[kPacked]);
                reshape(e.y, e.x);
                Draft d = Draft::of(kStreamElements, e);
                d.reads = {span_of(e.x)}, d.writes = {span_of(e.y)};
                stages.push_back(std::move(d));
            }
            return bind(q.xq, r);
        }
        if (const std::optional<size_t> at = lone_norm(r.a, r.k)) {  // the product norms for itself, and leaves the result for others
            r = recipe_of(stages[*at].get<StreamNormRows>().norm);
            stages.erase(stages.begin() + static_cast<std::ptrdiff_t>(*at));
        }
        return bind(q.xq, r);
    }
    /// The last stage, or one shortly before it, that norms one row into y, where that might as well happen now.
    std::optional<size_t> lone_norm(const float* y, i64 k) const {
        constexpr size_t kNear = 4;
        for (size_t i = stages.size(); i-- > 0 && stages.size() - i <= kNear;) {
            if (!meet({span_of(y, k * 4)}, stages[i].writes)) continue;
            if (stages[i].kind != kStreamNormRows) break;
            const StreamNormRows s = stages[i].get<StreamNormRows>();
            const FusedNormArgs& n = s.norm;
            if (reinterpret_cast<const float*>(n.y.data) != y || s.factor != 1.0f || !is_vector(n.y, k) || !is_vector(n.a, k)) break;
            if (n.has_b && (!is_vector(n.b, k) || !is_vector(n.sum, k))) break;
            if (stream_share(k, memory_->n_blocks) > kStreamStep || k % 32 || k > kStreamMostK) break;
            for (size_t j = i + 1; j < stages.size(); ++j)
                if (!independent(stages[i], stages[j])) return std::nullopt;
            return i;
        }
        return std::nullopt;
    }
    bool bind(const char* xq, const Recipe& recipe) {
        if (recipe.k % 32 || recipe.k > kStreamMostK) return false;
        if (recipe.input == kInputNorm && stream_share(recipe.k, memory_->n_blocks) > kStreamStep) return false;
        recipes_[xq] = recipe;
        if (kept_ == xq) kept_ = nullptr;
        return true;
    }
    static bool independent(const Draft& a, const Draft& b) { return !meet(a.reads, b.writes) && !meet(a.writes, b.writes) && !meet(a.writes, b.reads); }
    static Recipe recipe_of(const FusedNormArgs& n) {
        Recipe r{kInputNorm, reinterpret_cast<const float*>(n.a.data), nullptr, nullptr, nullptr, reinterpret_cast<float*>(n.y.data), n.eps, n.y.ne[0]};
        if (n.has_b) r.b = reinterpret_cast<const float*>(n.b.data), r.sum = reinterpret_cast<float*>(n.sum.data);
        if (n.has_weight) r.weight = reinterpret_cast<const float*>(n.weight.data);
        return r;
    }

    // ---- experts
    bool add_one_row(const MulMatArgs& m) {
        return n_elements(m.y) == 1 && m.k_begin == 0 && m.k_end == m.w.k && m.x.type == kF32 && add_floats(mul_vec_args(m), false);
    }
    /// A product of a few rows of floats, of one token: what a router sees, or (of one row) how much of a shared expert counts. The norm in front of it is its
    /// own work.
    bool add_floats(const MulVecArgs& m, bool is_router) {
        const Matrix& w = m.part[0].w;
        const i64 n = w.n;
        if (m.n_parts != 1 || m.x.ne[1] != 1 || w.k % 8 || w.k > kStreamMostK || stream_share(w.k, memory_->n_blocks) > kStreamStep || w.row_stride % 16 ||
            !is_vector(m.x, w.k) || m.part[0].y.nb[0] != 4 || reinterpret_cast<u64>(w.plane[0]) % 16 ||
            written(span_of(w.plane[0], (n - 1) * w.row_stride + w.k * 4)))
            return false;  // rows are read before the stage, in sixteens
        StreamFloats f{};
        f.w = reinterpret_cast<const float*>(w.plane[0]), f.row_stride = w.row_stride / 4, f.k = w.k, f.n = n;
        f.y = reinterpret_cast<float*>(m.part[0].y.data);
        Draft d;
        Recipe r;
        r.input = kInputPlain, r.a = reinterpret_cast<const float*>(m.x.data), r.k = w.k;
        if (still(last_norm_, r.a, w.k)) {
            r.a = last_norm_.copy;
        } else if (!stages.empty() && stages.back().kind == kStreamNormRows) {
            const StreamNormRows s = stages.back().get<StreamNormRows>();
            const FusedNormArgs& norm = s.norm;
            if (s.factor == 1.0f && norm.y.data == m.x.data && is_vector(norm.y, w.k) && is_vector(norm.a, w.k)) {
                r = recipe_of(norm);
                stages.pop_back();
            }
        }
        for (auto& [xq, of_int8] : recipes_)  // a norm that products will read as int8 too: they find it as floats, then
            if (r.input == kInputPlain && of_int8.input == kInputNorm && !of_int8.used && of_int8.norm == r.a) {
                r = of_int8;
                of_int8.input = kInputPlain, of_int8.a = of_int8.norm;
            }
        d.writes.push_back(span_of(f.y, n * 4));  // maybe where one of the norm's inputs is: then that is copied
        if (r.input == kInputNorm) {
            StreamProduct p{};  // as a product takes it
            p.k = static_cast<i32>(w.k);
            give_input(p, r, d, false);
            f.a = p.a, f.b = p.b, f.weight = p.weight, f.eps = p.eps, f.sum = p.sum, f.sum_copy = p.sum_copy, f.norm = p.norm, f.has_norm = 1;
            f.share = p.share;
            f.norm_copy = memory_->vectors[kNormed];
            last_norm_ = {f.norm, f.norm_copy};
            d.writes.push_back(span_of(f.norm_copy, w.k * 4));
        } else {
            f.a = r.a;
            d.reads.push_back(span_of(f.a, w.k * 4));
        }
        if (meet({span_of(f.y, n * 4)}, d.reads)) return false;
        if (is_router) {
            f.y_copy = memory_->vectors[kLogits];
            last_logits_ = {f.y, f.y_copy};
            d.writes.push_back(span_of(f.y_copy, n * 4));
        }
        Draft out = Draft::of(kStreamFloats, f);
        out.reads = d.reads, out.writes = d.writes;
        stages.push_back(std::move(out));
        kept_ = nullptr;  // its warps meet in the same shared memory
        return true;
    }
    /// In the order in which a host computes them: what comes later may take the memory of what came before.
    static std::vector<Result> results_of(StreamRoute& r) {
        auto result = [](auto*& p, i64 elems) { return Result{reinterpret_cast<void**>(&p), elems}; };
        return {result(r.biased, r.n_expert),
                result(r.gated, r.n_expert),
                result(r.selection, r.n_expert),
                result(r.order, r.n_order),
                result(r.chosen, r.n_used),
                result(r.after, r.n_used),
                result(r.sum, 1),
                result(r.clamped_sum, 1),
                result(r.norms, r.n_used),
                result(r.scaled_weights, r.n_used)};
    }
    /// A router's chain, if it is one that the kernel knows: see StreamRoute.
    bool add_router(const ChainArgs& c) {
        StreamRoute r{};
        const View& logits = c.step[0].a;
        r.n_expert = static_cast<i32>(logits.ne[0]);
        if (r.n_expert > kStreamMostExperts || !is_vector(logits, r.n_expert)) return false;
        if (!still(last_logits_, reinterpret_cast<const float*>(logits.data), r.n_expert)) return false;
        r.logits = last_logits_.copy;
        int at = 0;
        const char* now = logits.data;  // what the next step has to begin with
        auto next = [&](ChainOp op, i64 n) -> const ChainStep* {
            if (at == c.n_steps || c.step[at].op != op || c.step[at].a.data != now) return nullptr;
            const View& y = c.step[at].y;
            if (y.nb[0] != 4 || y.ne[0] * y.ne[1] != n || y.ne[2] * y.ne[3] != 1 || (y.ne[1] > 1 && y.ne[0] > 1)) return nullptr;
            if (y.ne[1] > 1 && y.nb[1] != 4) return nullptr;
            now = y.data;
            return &c.step[at++];
        };
        auto floats = [](const View& v) { return reinterpret_cast<float*>(v.data); };
        if (const ChainStep* s = next(ChainOp::kAdd, r.n_expert)) {
            if (!is_vector(s->b, r.n_expert)) return false;
            r.logits_bias = floats(s->b), r.biased = floats(s->y);
        }
        if (const ChainStep* s = next(ChainOp::kSoftMax, r.n_expert)) {
            r.gating = kGatingSoftMax, r.scale_before = s->p0, r.gated = floats(s->y);
        } else if (const ChainStep* g = next(ChainOp::kSigmoid, r.n_expert)) {
            r.gating = kGatingSigmoid, r.gated = floats(g->y);
        }
        const char* const gated = now;
        if (const ChainStep* s = r.gating ? next(ChainOp::kAdd, r.n_expert) : nullptr) {
            if (!is_vector(s->b, r.n_expert)) return false;
            r.selection_bias = floats(s->b), r.selection = floats(s->y);
        }
        if (at == c.n_steps || c.step[at].op != ChainOp::kArgsort) return false;
        r.n_order = static_cast<i32>(c.step[at].y.ne[0]);
        const ChainStep* const sort = next(ChainOp::kArgsort, r.n_order);
        if (!sort || sort->p0 == 0 || r.n_order > r.n_expert) return false;
        r.order = reinterpret_cast<i32*>(sort->y.data);
        now = gated;
        if (at == c.n_steps || c.step[at].op != ChainOp::kGetRows) return false;
        const View &rows = c.step[at].a, &ids = c.step[at].b;
        r.n_used = static_cast<i32>(ids.ne[0]);
        const ChainStep* const chosen = next(ChainOp::kGetRows, r.n_used);
        if (!chosen || rows.ne[0] != 1 || rows.ne[1] != r.n_expert || rows.nb[1] != 4 || ids.data != sort->y.data || ids.nb[0] != 4 || ids.ne[1] != 1 ||
            r.n_used > r.n_order || r.n_used > kVecSlots)
            return false;
        r.chosen = floats(chosen->y);
        if (const ChainStep* s = next(ChainOp::kSoftMax, r.n_used)) {
            if (s->y.ne[0] != r.n_used) return false;
            r.steps |= kRouteSoftMax, r.scale_after = s->p0, r.after = floats(s->y);
        }
        const char* const weights = now;
        if (const ChainStep* s = next(ChainOp::kSumRows, 1)) {
            r.steps |= kRouteDivide, r.sum = floats(s->y);
            if (const ChainStep* clamp = next(ChainOp::kClamp, 1)) {
                r.steps |= kRouteClamp, r.least = clamp->p0, r.most = clamp->p1, r.clamped_sum = floats(clamp->y);
            }
            const char* const sum = now;
            now = weights;
            const ChainStep* const divide = next(ChainOp::kDiv, r.n_used);
            if (!divide || divide->b.data != sum) return false;
            r.norms = floats(divide->y);
        }
        if (const ChainStep* s = next(ChainOp::kScale, r.n_used)) {
            r.steps |= kRouteScale, r.factor = s->p0, r.shift = s->p1, r.scaled_weights = floats(s->y);
        }
        if (at != c.n_steps || pending) return false;
        if (c.quantize.xq && !add_quantize(c.quantize)) return false;
        route_ = r, ids_ = ids.data, weights_ = now;
        pending = true;
        return true;
    }
    /// Each head's own matrix and input.
    bool add_heads(const MulVecIdArgs& m) {
        const auto found = m.xq ? recipes_.find(m.xq) : recipes_.end();
        const View& y = m.part[0].y;
        const i64 heads = m.part[0].w.ne2, n = m.part[0].w.n, stride = y.nb[1];
        if (found == recipes_.end() || found->second.k != m.k * heads || found->second.input != kInputPlain || !stream_can_type(m.part[0].w.type)) return false;
        if (pending || m.n_parts != 1 || m.scaled || m.bias[0].y.data || m.ids.ne[0] * m.ids.ne[1] != heads || y.nb[0] != 4 || y.ne[0] != n) return false;
        if (stride % 4 || stride < n * 4 || (y.ne[2] > 1 && y.nb[2] != y.ne[1] * stride)) return false;
        StreamProduct p{};
        p.n_parts = 1, p.type = m.part[0].w.type, p.k = static_cast<i32>(m.k), p.role = kHeads, p.y_stride = static_cast<i32>(stride / 4);
        if (!set_rows_of(p, m.part[0].w, true)) return false;
        p.part[0].w = m.part[0].w.plane[0];
        p.part[0].y = reinterpret_cast<float*>(y.data), p.part[0].n = static_cast<i32>(n);
        bool fits = false;
        for (i64 slots = std::min<i64>(heads, kVecSlots); slots > 0 && !fits; --slots) {
            if (heads % slots) continue;
            p.slots = static_cast<i32>(slots), p.slot_groups = static_cast<i32>(heads / slots);
            fits = stream_fit(p, memory_->n_blocks);
        }
        if (!fits) return false;
        const Recipe r = found->second;
        found->second.used = true;
        Draft d = Draft::of(kStreamProduct, p);
        d.writes = {span_of(p.part[0].y, (slots_before(p) + n) * 4)};
        give_input(p, r, d, false);
        kept_ = nullptr;
        d.set(p);
        stages.push_back(std::move(d));
        return true;
    }
    bool add_experts(const MulVecIdArgs& m) {
        if (!m.ids.data) return add_heads(m);
        const auto found = m.xq ? recipes_.find(m.xq) : recipes_.end();
        const i64 slots = m.ids.ne[0];
        if (found == recipes_.end() || found->second.used || !stream_can_type(m.part[0].w.type) || slots != route_.n_used || m.ids.ne[1] != 1) return false;
        if (m.ids.data != ids_ || m.ids.nb[0] != 4 || m.x.ne[2] * m.x.ne[3] != 1) return false;
        const bool sums = m.scaled != 0;
        if (m.n_parts > (sums ? 1 : 2) || m.x.ne[1] != (sums ? slots : 1) || found->second.k != m.k * m.x.ne[1]) return false;
        StreamExperts e{};
        StreamProduct& p = e.product;
        p.n_parts = m.n_parts, p.type = m.part[0].w.type, p.k = static_cast<i32>(m.k), p.slots = static_cast<i32>(slots);
        p.role = sums ? kExpertsSum : kExpertsEach, p.y_stride = static_cast<i32>(m.part[0].y.nb[1] / 4);
        Draft d = Draft::of(kStreamProduct, e);
        for (int i = 0; i < m.n_parts; ++i) {
            const MulVecPart& part = m.part[i];
            const View& y = mul_vec_id_result(m, i);
            if (!set_rows_of(p, part.w, i == 0) || !is_slots(part.y, part.w.n, slots) || !is_slots(y, part.w.n, slots)) return false;
            if (part.y.nb[1] != m.part[0].y.nb[1] || y.nb[1] != part.y.nb[1]) return false;
            p.part[i].w = part.w.plane[0];
            p.part[i].y = reinterpret_cast<float*>(y.data);
            p.part[i].n = static_cast<i32>(part.w.n);
            d.writes.push_back(span_of(y));
            if (y.data != part.y.data) {
                p.part[i].raw = reinterpret_cast<float*>(part.y.data);
                d.writes.push_back(span_of(part.y));
            }
            const ExpertBias& bias = m.bias[i];
            if (!bias.rows) continue;
            if (bias.row_bytes % 4 || written(span_of(bias.rows, (part.w.ne2 - 1) * bias.row_bytes + part.w.n * 4)))
                return false;  // it is read before the stage
            p.part[i].bias = reinterpret_cast<const float*>(bias.rows), p.part[i].bias_row = static_cast<i32>(bias.row_bytes / 4);
        }
        if (!sums) {
            e.route = route_;
            for (const Result& result : results_of(e.route)) {
                if (*result.at) d.writes.push_back(result.span());
            }
            for (const float* read : {e.route.logits, e.route.logits_bias, e.route.selection_bias})
                if (read) d.reads.push_back(span_of(read, e.route.n_expert * 4));
        } else {
            if (pending || m.weights.data != weights_ || m.n_sums != slots - 1 || !stream_fit(p, memory_->n_blocks)) return false;
            const View &y = mul_vec_id_result(m, 0), &products = m.products;
            e.sums.products = reinterpret_cast<float*>(products.data), e.sums.products_stride = products.nb[1] / 4;
            if (y.data != products.data) e.sums.y = p.part[0].y;
            if (p.part[0].raw && m.part[0].y.data == products.data) p.part[0].raw = nullptr;
            d.writes.push_back(span_of(products));
            p.part[0].y = e.sums.products;
            for (int i = 0; i < m.n_sums; ++i) {
                d.writes.push_back(span_of(m.sum[i]));
                p.part[0].y = reinterpret_cast<float*>(m.sum[i].data);
                if (i + 1 < m.n_sums) e.sums.sum[i] = p.part[0].y;
            }
            if (slots == 1) e.sums.products = nullptr;
        }
        const Recipe r = found->second;
        found->second.used = true;
        give_input(p, r, d, true);
        kept_ = m.xq;
        d.set(e);
        stages.push_back(std::move(d));
        pending = !sums;
        return true;
    }
    /// A row for each slot, at multiples of nb[1].
    static bool is_slots(const View& v, i64 n, i64 slots) {
        return v.type == kF32 && v.nb[0] == 4 && v.ne[0] == n && v.ne[1] == slots && v.ne[2] * v.ne[3] == 1 && v.nb[1] % 4 == 0 && v.nb[1] >= n * 4;
    }
    /// Rows of every part are as long as the first one's, with their planes where its are, and so are matrices of experts.
    static bool set_rows_of(StreamProduct& p, const Matrix& w, bool first) {
        const WeightFormat* format = find_weight_format(w.type);
        if (first) {
            p.row_bytes = static_cast<i32>(w.row_stride);
            for (int f = 0; format && f < format->n_fields; ++f) p.plane_at[f] = static_cast<i32>(w.plane[f] - w.plane[0]);
            if (p.role) p.expert_rows = static_cast<i32>(w.nb2 / w.row_stride);
        }
        for (int f = 0; format && f < format->n_fields; ++f)
            if (w.plane[f] - w.plane[0] != p.plane_at[f]) return false;
        if (w.row_stride != p.row_bytes || (p.role && w.nb2 != p.expert_rows * w.row_stride)) return false;
        return format && w.ne3 == 1;
    }

    bool add_glu(const RankLaunch& l) {
        const FusedGluArgs g = args_of<FusedGluArgs>(l);
        if (g.a.n || g.b.n || !g.xq) return false;
        return join_glu(l, g) || add_lone_glu(l, g);
    }
    static i32 glu_op(const RankLaunch& l) {
        for (size_t op = 0; op < std::size(kFusedGluKernels); ++op)
            if (!std::strcmp(l.launch.kernel, kFusedGluKernels[op])) return static_cast<i32>(op);
        return -1;
    }
    /// Of results of stages that lie further back: of an expert that all tokens share, whose products came before the others'.
    bool add_lone_glu(const RankLaunch& l, const FusedGluArgs& g) {
        const i64 n = g.glu.y.ne[0];
        const StreamGlu stage{g.glu, glu_op(l), 0};
        if (pending || stage.op < 0 || g.k_begin != 0 || g.k != n || !is_vector(g.glu.a, n) || !is_vector(g.glu.b, n) || !is_vector(g.glu.y, n)) return false;
        Recipe r;
        r.input = kInputPlain, r.a = reinterpret_cast<const float*>(g.glu.y.data), r.k = n;
        if (!bind(g.xq, r)) return false;
        Draft d = Draft::of(kStreamGlu, stage);
        d.reads = {span_of(g.glu.a), span_of(g.glu.b)};
        d.writes = {span_of(g.glu.y)};
        stages.push_back(std::move(d));
        return true;
    }
    /// Two products of the stage before become one whose tiles hold rows of both.
    bool join_glu(const RankLaunch& l, const FusedGluArgs& g) {
        if (stages.empty() || stages.back().kind != kStreamProduct) return false;
        StreamProduct p = stages.back().get<StreamProduct>();
        const i64 n = g.glu.y.ne[0], slots = p.role == kExpertsEach ? p.slots : 1;
        if (p.role != kExpertsSum && p.n_parts == 1) split(p, 0, n);
        if (p.n_parts != 2 || p.glu || p.part[0].n != n || p.part[1].n != n) return false;
        if (!p.role && (g.k_begin != 0 || g.k != n || !is_vector(g.glu.y, n))) return false;
        if (p.role && (!is_slots(g.glu.y, n, slots) || g.k * slots > kStreamMostK)) return false;
        p.glu_stride = static_cast<i32>(g.glu.y.nb[1] / 4);
        if (g.glu.a.data != reinterpret_cast<char*>(p.part[0].y) || g.glu.b.data != reinterpret_cast<char*>(p.part[1].y)) {
            if (g.glu.b.data != reinterpret_cast<char*>(p.part[0].y) || g.glu.a.data != reinterpret_cast<char*>(p.part[1].y)) return false;
            std::swap(p.part[0], p.part[1]);
        }
        p.glu = 1 + glu_op(l);
        p.alpha = g.glu.alpha, p.limit = g.glu.limit;
        p.glu_y = reinterpret_cast<float*>(g.glu.y.data);
        if (!p.glu || !stream_fit(p, memory_->n_blocks)) return false;
        Draft& d = stages.back();
        if (p.role) {  // the host may have given the sums behind the next product this memory
            p.glu_copy = memory_->vectors[kGlu], p.glu_k = static_cast<i32>(g.k), p.glu_begin = static_cast<i32>(g.k_begin);
            d.writes.push_back(span_of(p.glu_copy, g.k * slots * 4));
            pending = false;
        }
        Recipe r;
        r.input = kInputPlain, r.a = p.glu_copy ? p.glu_copy : p.glu_y, r.k = g.k * slots;
        const Span y = span_of(g.glu.y);
        if (!bind(g.xq, r) || meet({y}, d.reads)) return false;
        d.set(p);
        d.writes.push_back(y);
        return true;
    }
    /// A part becomes two, of which the first has `rows` rows: models have gates and ups, or queries, keys and values, in one matrix. Where they are the parts
    /// that they were, or there is no room for one more, nothing happens.
    static void split(StreamProduct& p, int part, i64 rows) {
        StreamPart& first = p.part[part];
        if (p.n_parts == 3 || rows <= 0 || rows >= first.n) return;
        for (int i = p.n_parts++; i > part + 1; --i) p.part[i] = p.part[i - 1];
        StreamPart& second = p.part[part + 1];
        second = first;
        first.n = static_cast<i32>(rows), second.n -= static_cast<i32>(rows);
        second.w += rows * p.row_bytes;
        second.y += rows;
        for (float** more : {&second.copy, &second.raw})
            if (*more) *more += rows;
        if (second.bias) second.bias += rows;
    }
    bool add_product(const MulVecArgs& m) {
        if (m.x.ne[1] != 1 || !m.xq || !stream_can_type(m.part[0].w.type)) return false;
        const auto found = recipes_.find(m.xq);
        if (found == recipes_.end() || found->second.k != m.k) return false;
        const Recipe r = found->second;
        StreamProduct p{};
        p.n_parts = m.n_parts;
        p.type = m.part[0].w.type;
        p.k = static_cast<i32>(m.k);
        for (int i = 0; i < m.n_parts; ++i) {
            const MulVecPart& part = m.part[i];
            if (part.y.nb[0] != 4 || part.y.type != kF32 || !set_rows_of(p, part.w, i == 0)) return false;
            p.part[i].w = part.w.plane[0];
            p.part[i].y = reinterpret_cast<float*>(part.y.data);
            p.part[i].n = static_cast<i32>(part.w.n);
        }
        if (!stream_fit(p, memory_->n_blocks)) return false;
        Draft d = Draft::of(kStreamProduct, p);
        for (int i = 0; i < m.n_parts; ++i) d.writes.push_back(span_of(p.part[i].y, p.part[i].n * 4));
        if (kept_ != m.xq) {
            if (r.used) return false;
            found->second.used = true;
            give_input(p, r, d, true);
        }
        kept_ = m.xq;
        d.set(p);
        stages.push_back(std::move(d));
        return true;
    }
    /// The recipe becomes the product's input. Copies that only this kernel knows take the place of memory that the host may reuse.
    /// norms_b: what takes it can norm what is added, too.
    void give_input(StreamProduct& p, const Recipe& r, Draft& d, bool norms_b) {
        p.input = r.input;
        p.a = r.a, p.b = r.b, p.weight = r.weight, p.eps = r.eps, p.sum = r.sum, p.norm = r.norm;
        p.share = stream_share(r.k, memory_->n_blocks);
        bool own_a = false, own_b = false;
        if (p.input == kInputPlain && still(last_norm_, p.a, r.k)) p.a = last_norm_.copy, own_a = true;
        if (p.input == kInputNorm) {
            if (norms_b) take_norm_of_b(p, r.k);
            own_a = take_copy(p.a, r.k);
            own_b = take_copy(p.b, r.k);
            if (r.sum) {
                next_sum_ ^= 1;
                p.sum_copy = memory_->vectors[kSum0 + next_sum_];
                last_sum_ = {r.sum, p.sum_copy};
                d.writes.push_back(span_of(p.sum, r.k * 4));
                d.writes.push_back(span_of(p.sum_copy, r.k * 4));
            }
            if (r.norm) d.writes.push_back(span_of(r.norm, r.k * 4));
        }
        auto import = [&](const float*& from, int vector) {
            if (!from || (!cautious && !meet({span_of(from, r.k * 4)}, d.writes))) return;
            const StreamCopy copy{from, memory_->vectors[vector], r.k};
            Draft c = Draft::of(kStreamCopy, copy);
            c.reads = {span_of(from, r.k * 4)};
            c.writes = {span_of(copy.to, r.k * 4)};
            stages.push_back(std::move(c));
            from = copy.to;
        };
        if (!own_a) import(p.a, kImportA);
        if (!own_b) import(p.b, kImportB);
        d.reads.push_back(span_of(p.a, r.k * 4));
        if (p.b) d.reads.push_back(span_of(p.b, r.k * 4));
    }
    /// What is added to a residual may come out of a norm of its own, which blocks do for themselves then: a stage less. Its result must be nobody else's: the sum
    /// takes its place.
    void take_norm_of_b(StreamProduct& p, i64 k) {
        constexpr size_t kNear = 4;  // stages: rows that are wanted of the last layer may be taken in between
        for (size_t i = stages.size(); i-- > 0 && stages.size() - i <= kNear && p.b;) {
            if (stages[i].kind != kStreamNormRows) continue;
            const StreamNormRows s = stages[i].get<StreamNormRows>();
            const FusedNormArgs& n = s.norm;
            const float* const y = reinterpret_cast<const float*>(n.y.data);
            if (y != p.a && y != p.b) continue;
            const std::vector<Span> from = {span_of(n.a)}, to = {span_of(n.y)};
            if (y != p.sum || s.factor != 1.0f || n.has_b || !n.has_weight || n.eps != p.eps || !is_vector(n.a, k) || !is_vector(n.y, k) ||
                !is_vector(n.weight, k))
                return;
            for (size_t j = i + 1; j < stages.size(); ++j)
                if (meet(from, stages[j].writes) || meet(to, stages[j].writes) || meet(to, stages[j].reads)) return;
            if (y == p.a) p.a = p.b;
            p.b = reinterpret_cast<const float*>(n.a.data), p.b_weight = reinterpret_cast<const float*>(n.weight.data);
            stages.erase(stages.begin() + static_cast<std::ptrdiff_t>(i));
            return;
        }
    }
    struct Copy {
        const float* host = nullptr;
        float* copy = nullptr;
    };
    /// Whether c is the copy of what now lies at `from`: its stage is the last that wrote there.
    bool still(const Copy& c, const float* from, i64 n) const {
        if (!from || c.host != from) return false;
        for (size_t i = stages.size(); i-- > 0;)
            if (meet({span_of(from, n * 4)}, stages[i].writes)) return meet({span_of(c.copy, n * 4)}, stages[i].writes);
        return false;
    }
    /// Reads the copy of a residual or of a product's result instead, where there is one. Hosts add them in either order.
    bool take_copy(const float*& from, i64 k) {
        if (!from) return false;
        const float* copy = still(last_sum_, from, k) ? last_sum_.copy : copy_of_output(from, k, next_added_, kAdded0, 3);
        if (copy) from = copy;
        return copy != nullptr;
    }
    /// One of n_vectors, from `turn` on, that nobody has read or written since stage i began: that stage's slow blocks may still read their input where its
    /// fast ones store. Null: there is none.
    float* free_vector(size_t i, i64 n, int turn, int vectors, int n_vectors) const {
        for (int k = 0; k < n_vectors; ++k) {
            float* const vector = memory_->vectors[vectors + (turn + k) % n_vectors];
            const std::vector<Span> span = {span_of(vector, n * 4)};
            if (std::none_of(stages.begin() + static_cast<std::ptrdiff_t>(i), stages.end(),
                             [&](const Draft& d) { return meet(span, d.reads) || meet(span, d.writes); }))
                return vector;
        }
        return nullptr;
    }
    /// A copy of what the last product or all_reduce before stage `end` wrote to y, made by its stage in one of n_vectors by turns; null when
    /// some other stage wrote it, or all of them are in use.
    float* copy_of_output(const float* y, i64 n, int& turn, int vectors, int n_vectors, size_t end = SIZE_MAX) {
        const Span wanted = span_of(y, n * 4);
        for (size_t i = std::min(end, stages.size()); i-- > 0;) {
            Draft& d = stages[i];
            if (!meet({wanted}, d.writes)) continue;
            float* const copy = free_vector(i, n, turn, vectors, n_vectors);
            if (!copy) return nullptr;
            bool made = false;
            if (d.kind == kStreamProduct) {
                StreamProduct p = d.get<StreamProduct>();
                for (int j = 0; j < p.n_parts && !p.role && !p.glu && !p.n_push; ++j) {
                    const i64 before = y - p.part[j].y;
                    if (before <= 0 || before + n > p.part[j].n || p.part[j].copy) continue;
                    split(p, j, before);
                }
                for (int j = 0; j < p.n_parts && !p.role && !p.glu && !p.n_push; ++j)
                    if (p.part[j].y == y && p.part[j].n > n && !p.part[j].copy) split(p, j, n);
                for (StreamPart& part : p.part) {
                    if (part.y != y || part.n != n || part.copy || p.n_push || p.glu || p.role == kHeads) continue;
                    part.copy = copy;
                    made = true;
                }
                if (made && p.n_parts != d.get<StreamProduct>().n_parts && !stream_fit(p, memory_->n_blocks)) return nullptr;
                if (made) d.set(p);
            } else if (d.kind == kStreamReduce) {
                StreamReduce r = d.get<StreamReduce>();
                made = r.y == y && r.n == n && !r.copy;
                if (made) r.copy = copy;
                d.set(r);
            } else if (d.kind == kStreamBinary) {
                StreamBinary b = d.get<StreamBinary>();
                made = reinterpret_cast<float*>(b.args.y.data) == y && is_vector(b.args.y, n) && !b.copy && !b.n_push;
                if (made) b.copy = copy;
                d.set(b);
            }
            if (!made) return nullptr;
            d.writes.push_back(span_of(copy, n * 4));
            turn = (turn + 1) % n_vectors;
            return copy;
        }
        return nullptr;
    }
    bool add_flash(FlashSplitArgs f) {
        const FlashAttnArgs& a = f.a;
        const i64 cells = a.k.ne[1];
        if (a.q.ne[1] != 1 || a.q.ne[3] != 1 || cells <= 0) return false;
        if (a.has_mask && written(span_of(a.mask))) return false;  // it is looked at before the stage, as is the row that the token's cell is
        const auto d = static_cast<int>(a.q.ne[0]);
        const i64 most = cells <= kWholeCells ? 1 : (cells + kLeastCells - 1) / kLeastCells;
        if (most == 1) {
            f.head_groups = (a.gqa_ratio + kWholeHeads - 1) / kWholeHeads;
            f.group_heads = (a.gqa_ratio + f.head_groups - 1) / f.head_groups;
        }
        const int meet_bytes = flash_columns_floats(kStreamWarps, std::min(a.gqa_ratio, f.group_heads), d) * 4;
        if (kStreamQueryBytes + meet_bytes > kStreamInputBytes) return false;
        const i64 units = a.k.ne[2] * f.head_groups;
        const i64 splits = std::clamp<i64>(memory_->n_blocks / std::max<i64>(units, 1), 1, most);
        f.cells = static_cast<i32>(round_up((cells + splits - 1) / splits, kColumnsStep));
        f.n_splits = static_cast<i32>((cells + f.cells - 1) / f.cells);
        StreamFlash stage{};
        stage.args = f;
        stage.n_units = static_cast<i32>(units);
        Draft out = Draft::of(kStreamFlash, stage);
        out.reads = {span_of(a.k), span_of(a.v)};
        if (take_own_token(stage, out)) stages.pop_back();
        else out.reads.push_back(span_of(a.q));
        if (a.has_mask) out.reads.push_back(span_of(a.mask));
        if (!stage.own.table) stage.own = {};
        const bool known = cells > (stage.own.q_norm ? kStreamedCellsNormed : kStreamedCells) && own_cells(stage);
        for (const StreamOwnToken::Cache& cache : {stage.own.k_cache, stage.own.v_cache})
            if (cache.row && written(span_of(cache.row, 8))) return false;
        if (known) stream_cells_fit(stage, memory_->n_blocks);
        if (!stage.cells.groups && !stage.own.table) stage.own = {};
        out.set(stage);
        push_attention(std::move(out));
        pending = true;
        return true;
    }
    void push_attention(Draft d) {
        // Offsets for now; a later attention of the run uses the same scratch.
        StreamFlash f = d.get<StreamFlash>();
        const i64 acc_bytes = round_up(flash_split_acc(f.args) * 4, kAlign), meta_bytes = round_up(flash_split_meta(f.args) * 4, kAlign);
        f.args.acc = nullptr;
        f.args.meta = reinterpret_cast<float*>(acc_bytes);
        scratch_bytes = std::max(scratch_bytes, acc_bytes + meta_bytes);
        d.set(f);
        stages.push_back(std::move(d));
        kept_ = nullptr;  // its warps meet in the same shared memory
    }
    /// Latent attention of queries and a cache that are in memory; latent_heads() may take what makes them into it.
    bool add_latent(const FlashSplitArgs& f) {
        const FlashAttnArgs& a = f.a;
        const i64 cells = a.k.ne[1], heads = a.q.ne[2], units = std::max<i64>((heads + kStreamLatentHeads - 1) / kStreamLatentHeads, 1);
        auto sixteens = [](const View& v) { return reinterpret_cast<u64>(v.data) % 16 == 0 && v.nb[1] % 16 == 0 && v.nb[2] % 16 == 0; };
        if (a.q.ne[1] != 1 || a.q.ne[3] != 1 || a.k.ne[3] != 1 || a.max_bias != 0 || a.logit_softcap != 0 || heads * a.q.nb[2] >= i64{1} << 31) return false;
        if (pending || !sixteens(a.q) || (a.has_mask && written(span_of(a.mask)))) return false;
        const bool alone = f.n_splits == 1;  // no combination follows
        StreamFlash stage{};
        stage.args = f;
        if (!stream_latent_fit(stage, alone || cells <= kStreamLatentWhole ? 1 : memory_->n_blocks / units)) return false;
        StreamLatent& l = stage.latent;
        l.used = 1;
        l.q = reinterpret_cast<const float*>(a.q.data), l.q_stride = static_cast<i32>(a.q.nb[2] / 4), l.n_plain = static_cast<i32>(a.q.ne[0]);
        for (const Draft& d : stages) {  // the token's own cell is on its way before it is written: its row comes otherwise
            if (!meet({span_of(a.k)}, d.writes)) continue;
            const bool latent = d.kind == kStreamFlash && d.get<StreamFlash>().latent.used;
            if (latent || d.kind != kStreamSetRows || l.cache.row) return false;
            const SetRowsArgs store = d.get<SetRowsArgs>();
            if (n_elements(store.idx) != 1 || !cache_of(store, a.k, l.cache)) return false;
            l.fault = store.fault;
        }
        if (l.cache.row && written(span_of(l.cache.row, 8))) return false;
        Draft d = Draft::of(kStreamFlash, stage);
        d.reads = {span_of(a.q), span_of(a.k)};
        if (l.cache.row) d.reads.push_back(span_of(l.cache.row, l.cache.row_type == kI64 ? 8 : 4));
        if (a.has_mask) d.reads.push_back(span_of(a.mask));
        if (alone) {
            if (meet({span_of(a.y)}, d.reads) || !sixteens(a.y)) return false;
            stage.y = a.y;
            d.set(stage);
            d.writes = {span_of(a.y)};
        }
        push_attention(std::move(d));
        pending = !alone;
        return true;
    }
    bool written(const Span& span) const {
        return std::any_of(stages.begin(), stages.end(), [&](const Draft& d) { return meet({span}, d.writes); });
    }
    /// Whether what this launch writes of an attention's K and V is known: one cell of each, or nothing. Then f.own says where it is.
    bool own_cells(StreamFlash& f) const {
        StreamOwnToken& own = f.own;
        auto one_row = [](const View& x) { return x.ne[0] * x.ne[1] * x.ne[2] * x.ne[3] == 1; };
        auto find = [&](const View& seen, StreamOwnToken::Cache& known) {
            for (const Draft& d : stages) {
                if (!meet({span_of(seen)}, d.writes)) continue;
                StreamOwnToken::Cache to{};
                auto of_store = [&](const SetRowsArgs& store) {
                    own.fault = store.fault;
                    return one_row(store.idx) && cache_of(store, seen, to);
                };
                bool found = false;
                if (d.kind == kStreamRopeStore) {
                    const RopeStoreArgs r = d.get<StreamRope>().args;
                    int writers = 0;
                    for (int i = 0; i < r.n_stores; ++i)
                        if (span_of(r.store[i].y).meets(span_of(seen))) found = of_store(r.store[i]), ++writers;
                    found &= writers == 1;
                } else if (d.kind == kStreamSetRows) {
                    found = of_store(d.get<SetRowsArgs>());
                } else if (d.kind == kStreamFlash) {
                    const StreamOwnToken other = d.get<StreamFlash>().own;
                    own.fault = other.fault;
                    for (const StreamOwnToken::Cache& cache : {other.k_cache, other.v_cache}) {
                        const i64 from = seen.data - cache.data;
                        if (!cache.row || from < 0 || from >= cache.n_rows * cache.row_bytes || cache.row_bytes != seen.nb[1] || from % cache.row_bytes)
                            continue;
                        to = cache, to.first = from / cache.row_bytes;
                        found = true;
                    }
                }
                if (!found || (known.row && std::memcmp(&known, &to, sizeof to) != 0)) return false;
                known = to;
            }
            return true;
        };
        const bool taken = own.table;  // its own stage writes: then no other may
        StreamOwnToken::Cache k{}, v{};
        if (!find(f.args.a.k, k) || !find(f.args.a.v, v)) return false;
        if (taken && (k.row || v.row)) return false;
        if (!taken) own.k_cache = k, own.v_cache = v;
        return !own.k_cache.row == !own.v_cache.row;
    }
    /// Whether the attention can do what the stage before it does, which turns its queries and keys and stores its keys and values: one hand-over
    /// less a layer. What it reads must not lie where it, or the same stage of another block, writes.
    bool take_own_token(StreamFlash& f, Draft& out) {
        if (stages.empty() || stages.back().kind != kStreamRopeStore || cautious) return false;
        const FlashAttnArgs& a = f.args.a;
        const StreamRope ropes = stages.back().get<StreamRope>();
        const RopeStoreArgs& r = ropes.args;
        if (r.n_ropes != 2 || r.n_stores != 2 || r.stored_rope < 0 || ropes.table[0] != ropes.table[1]) return false;
        const RopeArgs &k = r.rope[r.stored_rope], &q = r.rope[1 - r.stored_rope];
        const i64 d = a.q.ne[0], k_heads = a.k.ne[2], q_heads = a.q.ne[2];
        if (k_heads == 0) return true;  // a rank without heads has the stages of the others
        auto heads = [d](const View& v, i64 n) { return is_packed(v, d * n) && v.ne[0] == d; };
        if (!heads(q.x, q_heads) || !heads(q.y, q_heads) || !heads(k.x, k_heads) || !heads(k.y, k_heads)) return false;
        if (a.q.data != q.y.data || (q_heads > 1 && a.q.nb[2] != d * 4) || q.n_dims != k.n_dims || q.n_offs != k.n_offs || q.neox != k.neox) return false;
        if (q.n_dims % 8 || q.n_offs % 8 || (q.neox && q.n_dims % 16) || k.factor != 1.0f) return false;
        StreamOwnToken& own = f.own;
        const SetRowsArgs& v = r.store[1];
        if (!is_packed(v.x, d * k_heads) || !cache_of(r.store[0], a.k, own.k_cache) || !cache_of(v, a.v, own.v_cache)) return false;
        own.fault = v.fault;
        own.q = reinterpret_cast<const float*>(q.x.data), own.k = reinterpret_cast<const float*>(k.x.data), own.v = reinterpret_cast<const float*>(v.x.data);
        const std::optional<size_t> q_norm = head_norm(q), k_norm = head_norm(k);
        i64 q_stride = d;
        if (q_norm && k_norm && d % 32 == 0) {
            auto take = [&](size_t at, const float*& x, const float*& weight, float& eps, i64 heads_n, i64& stride) {
                const FusedNormArgs n = stages[at].get<StreamNormRows>().norm;
                x = reinterpret_cast<const float*>(n.a.data), weight = reinterpret_cast<const float*>(n.weight.data), eps = n.eps;
                stride = n.a.ne[1] > 1 ? n.a.nb[1] / 4 : d;
                if (stride != d) return;
                if (const float* copy = copy_of_output(x, d * heads_n, next_turned_, kTurned0, 3, at)) x = copy;
            };
            i64 k_stride = d;
            take(*q_norm, own.q, own.q_norm, own.q_eps, q_heads, q_stride);
            take(*k_norm, own.k, own.k_norm, own.k_eps, k_heads, k_stride);
            if (k_stride != d || q_stride < d || q_stride > 1 << 20) return false;
        }
        own.q_y = reinterpret_cast<float*>(q.y.data), own.k_y = reinterpret_cast<float*>(k.y.data);
        if (const float* copy = copy_of_output(own.v, d * k_heads, next_turned_, kTurned0, 3)) own.v = copy;
        const Draft before = stages.back();
        const std::vector<Span> inputs = {span_of(own.q, ((q_heads - 1) * q_stride + d) * 4), span_of(own.k, d * k_heads * 4), span_of(own.v, d * k_heads * 4)};
        if (meet(inputs, before.writes)) return false;
        for (const float* p : {own.q, own.k, own.v, own.q_norm, own.k_norm})
            if (reinterpret_cast<u64>(p) % 16) return false;  // it is read in sixteens
        own.table = ropes.table[0];
        own.n_dims = q.n_dims, own.n_offs = q.n_offs, own.neox = q.neox;
        f.q_factor = q.factor, f.args.a.scale *= q.factor;
        own.width_inverse = stream_inverse(d / 4);
        own.q_stride = static_cast<i32>(q_stride);
        if (own.q_norm) {
            stages.erase(stages.begin() + static_cast<std::ptrdiff_t>(std::max(*q_norm, *k_norm)));
            stages.erase(stages.begin() + static_cast<std::ptrdiff_t>(std::min(*q_norm, *k_norm)));
        }
        for (const Span& read : before.reads)  // what the norms would have left is nowhere
            if (!own.q_norm || !meet({read}, {span_of(q.x), span_of(k.x)})) out.reads.push_back(read);
        out.reads.insert(out.reads.end(), inputs.begin(), inputs.end());
        out.writes = before.writes;
        return true;
    }
    /// The stage that norms what this rope turns, where an attention can do that with its own heads: its result lies where the rope's will.
    std::optional<size_t> head_norm(const RopeArgs& rope) const {
        for (size_t i = stages.size(); i-- > 0 && stages.size() - i <= 4;) {
            if (stages[i].kind != kStreamNormRows) continue;
            const StreamNormRows s = stages[i].get<StreamNormRows>();
            const FusedNormArgs& n = s.norm;
            if (s.factor != 1.0f) break;
            const i64 elems = rope.x.ne[0] * rope.x.ne[1];
            if (n.y.data != rope.x.data) continue;
            const bool heads = n.a.type == kF32 && n.a.nb[0] == 4 && n.a.nb[1] % 16 == 0 && n.a.ne[0] * n.a.ne[1] == elems && n.a.ne[2] * n.a.ne[3] == 1;
            if (rope.y.data != rope.x.data || n.has_b || !n.has_weight || !heads || !is_packed(n.y, elems) || n.a.ne[0] != rope.x.ne[0]) break;
            return i;
        }
        return std::nullopt;
    }
    bool add_combine(FlashCombineArgs c) {
        if (stages.empty() || stages.back().kind != kStreamFlash || c.y.ne[2] * c.y.ne[3] != 1 || c.y.nb[0] != 4) return false;
        const FlashSplitArgs f = stages.back().get<StreamFlash>().args;
        const i64 k = c.y.ne[0] * c.y.ne[1];
        if (stream_combine_bytes(f.n_splits) > kStreamInputBytes || c.y.ne[0] % 4) return false;
        if (c.xq) {
            if (c.y.nb[1] != c.y.ne[0] * 4) return false;
            Recipe r;
            r.input = kInputPlain, r.a = reinterpret_cast<const float*>(c.y.data), r.k = k;
            if (!bind(c.xq, r)) return false;
        }
        Draft& flash = stages.back();
        StreamFlash whole = flash.get<StreamFlash>();
        // One piece is the result, unless that lies where another block may still read what it needs. Of streamed cells there are pieces on each rank.
        if (!cautious && f.n_splits == 1 && f.a.k.ne[1] <= kStreamedCells && !meet({span_of(c.y)}, flash.reads) &&
            (!whole.latent.used || (reinterpret_cast<u64>(c.y.data) | static_cast<u64>(c.y.nb[1])) % 16 == 0)) {
            whole.y = c.y;
            // The host's allocator gives it what nobody reads any more: the turned keys, once they are in the cache.
            const i64 d = f.a.q.ne[0];
            if (whole.own.k_y && meet({span_of(c.y)}, {span_of(whole.own.k_y, d * f.a.k.ne[2] * 4)})) whole.own.k_y = nullptr;
            if (whole.own.q_y && meet({span_of(c.y)}, {span_of(whole.own.q_y, d * f.a.q.ne[2] * 4)})) whole.own.q_y = nullptr;
            whole.args.a.sinks = c.sinks, whole.args.a.has_sinks = c.has_sinks, whole.args.a.head_offset = c.head_offset;
            flash.set(whole);
            flash.writes.push_back(span_of(c.y));
            pending = false;
            return true;
        }
        c.acc = f.acc, c.meta = f.meta, c.n_splits = f.n_splits, c.xq = c.xd = nullptr;
        Draft d = Draft::of(kStreamCombine, StreamCombine{c, stream_inverse((c.y.ne[0] + 31) / 32), 0});
        d.writes = {span_of(c.y)};
        stages.push_back(std::move(d));
        pending = false;
        return true;
    }
    /// Where the turns of this rope stand, the same in all layers; null: too many kinds.
    float* table_of(const RopeArgs& rope) {
        RopeArgs key = rope;
        key.x = key.y = View{};
        key.neox = key.n_offs = 0;
        key.factor = 1.0f;
        std::string bytes(reinterpret_cast<const char*>(&key), sizeof key);
        if (const auto found = tables_.find(bytes); found != tables_.end()) return found->second;
        if (tables_.size() == kMostTables || rope.n_dims > kTableFloats) return nullptr;
        float* table = memory_->vectors[kTables] + static_cast<i64>(tables_.size()) * kTableFloats;
        tables_[bytes] = table;
        Draft d = Draft::of(kStreamTurns, StreamTurns{rope, table});
        d.reads = {span_of(rope.pos)};
        d.writes = {span_of(table, rope.n_dims * 4)};
        stages.push_back(std::move(d));
        return table;
    }
    bool add_rope(const RankLaunch& l) {
        StreamRope s{};
        RopeStoreArgs& a = s.args;
        if (named(l, "rope_store")) {
            a = args_of<RopeStoreArgs>(l);
        } else {
            if (l.args.size() != sizeof(RopeArgs)) return false;
            a.rope[0] = args_of<RopeArgs>(l);
            a.n_ropes = 1;
            a.stored_rope = -1;
        }
        Draft d;
        for (int i = 0; i < a.n_ropes; ++i) {
            View& x = a.rope[i].x;
            if (x.ne[2] * x.ne[3] != 1 || a.rope[i].sectioned == kVision) return false;
            // K's result may lie where Q's input was: with a copy of the input both can be turned at once.
            const i64 n = x.ne[0] * x.ne[1];
            if (x.type == kF32 && x.nb[0] == 4 && x.nb[1] == x.ne[0] * 4)
                if (float* copy = copy_of_output(reinterpret_cast<const float*>(x.data), n, next_turned_, kTurned0, 3)) x.data = reinterpret_cast<char*>(copy);
            s.table[i] = table_of(a.rope[i]);
            if (!s.table[i]) return false;
            d.reads.push_back(span_of(x));
            d.reads.push_back(span_of(s.table[i], a.rope[i].n_dims * 4));
            d.writes.push_back(span_of(a.rope[i].y));
        }
        for (int i = 0; i < a.n_stores; ++i) {
            if (i > 0 || a.stored_rope < 0) d.reads.push_back(span_of(a.store[i].x));
            d.writes.push_back(span_of(a.store[i].y));
        }
        if (!stages.empty() && stages.back().kind == kStreamRopeStore) {
            Draft& last = stages.back();
            StreamRope first = last.get<StreamRope>();
            if (first.args.n_ropes == 1 && first.args.n_stores == 0 && a.n_ropes == 1 && !meet(d.reads, last.writes) && !meet(d.writes, last.writes) &&
                !meet(d.writes, last.reads)) {
                first.args.rope[1] = a.rope[0], first.table[1] = s.table[0], first.args.n_ropes = 2;
                std::copy(a.store, a.store + 2, first.args.store);
                first.args.n_stores = a.n_stores;
                first.args.stored_rope = a.stored_rope < 0 ? -1 : 1;
                s = first;
                d.reads.insert(d.reads.end(), last.reads.begin(), last.reads.end());
                d.writes.insert(d.writes.end(), last.writes.begin(), last.writes.end());
                stages.pop_back();
            }
        }
        const Launch launch = rope_store_launch(a, {});
        if (!launch.kernel || launch.grid[0] > kMostElems / 256) return false;
        Draft whole = Draft::of(kStreamRopeStore, s);
        whole.count = static_cast<i32>(launch.grid[0]);
        whole.reads = d.reads, whole.writes = d.writes;
        stages.push_back(std::move(whole));
        return true;
    }
    bool add_set_rows(const SetRowsArgs& a) {
        if (n_elements(a.x) > kMostElems) return false;
        Draft d = Draft::of(kStreamSetRows, a);
        d.reads = {span_of(a.x)};
        d.writes = {span_of(a.y)};
        stages.push_back(std::move(d));
        return true;
    }
    bool add_get_rows(const GetRowsArgs& a) {
        if (a.w.repacked) return false;
        const bool whole = a.w_view.type == kF32 && a.y.type == kF32 && a.w_view.nb[0] == 4 && a.y.nb[0] == 4 && a.y.ne[2] * a.y.ne[3] == 1 &&
                           a.w_view.ne[2] * a.w_view.ne[3] == 1 && a.w_view.ne[0] == a.y.ne[0] && a.w.type == kF32;
        if (n_elements(a.y) > (whole ? kMostCopied : kMostElems)) return false;
        Draft d = Draft::of(kStreamGetRows, a);
        d.count = whole;
        d.reads = {span_of(a.w_view), span_of(a.idx)};
        d.writes = {span_of(a.y)};
        stages.push_back(std::move(d));
        return true;
    }
    bool add_binary(const RankLaunch& l) {
        StreamBinary b{};
        b.args = args_of<BinaryArgs>(l), b.op = -1;

        if (n_elements(b.args.y) > kMostElems) return false;
        for (int op = 0; op < 4; ++op)
            if (!std::strcmp(l.launch.kernel, kBinaryKernels[op])) b.op = op;
        if (b.op == 0 && add_bias(b.args)) return true;
        if (b.op >= 0 && !stages.empty() && stages.back().kind == kStreamElements && same_view(stages.back().get<StreamElements>().y, b.args.a) &&
            same_view(b.args.a, b.args.y) && !meet({span_of(b.args.b)}, stages.back().writes) &&
            stages.back().get<StreamElements>().n_steps < kStreamElementSteps)
            return add_element_op(b.args.a, b.args.y, {b.args.b}, [&](StreamElements::Step& step) { step.op = kStreamWithOther + b.op, step.b = b.args.b; });
        Draft d = Draft::of(kStreamBinary, b);
        d.reads = {span_of(b.args.a), span_of(b.args.b)};
        d.writes = {span_of(b.args.y)};
        stages.push_back(std::move(d));
        return b.op >= 0;
    }

    // ---- what linear attention and other states are made of
    /// Into the stage before, where that leaves what this one takes, in the same place: nobody else can want it.
    template <class Add>
    bool add_element_op(const View& x, const View& y, const std::vector<View>& others, const Add& add) {
        if (n_elements(y) > kMostElems || x.type != kF32 || y.type != kF32 || pending) return false;
        if (!same_view(x, y) && meet({span_of(x)}, {span_of(y)})) return false;
        if (!stages.empty() && same_view(x, y)) make_elements(stages.back(), x);
        std::vector<Span> more;
        for (const View& other : others) more.push_back(span_of(other));
        if (!stages.empty() && stages.back().kind == kStreamElements) {
            Draft& last = stages.back();
            StreamElements e = last.get<StreamElements>();
            const bool reshaped = others.empty() && is_dense(e.y) && is_dense(x) && e.y.data == x.data && n_elements(e.y) == n_elements(x);
            if (e.n_steps < kStreamElementSteps && (same_view(e.y, x) || reshaped) && same_view(x, y) && !meet(more, last.writes)) {
                add(e.step[e.n_steps++]);
                last.reads.insert(last.reads.end(), more.begin(), more.end());
                last.set(e);
                return true;
            }
        }
        StreamElements e{};
        e.x = x, e.y = y;
        add(e.step[e.n_steps++]);
        Draft d = Draft::of(kStreamElements, e);
        d.reads = more;
        d.reads.push_back(span_of(x));
        d.writes = {span_of(y)};
        stages.push_back(std::move(d));
        return true;
    }
    /// A sum, a product, ... of two that x is, as ops that another can follow.
    static void make_elements(Draft& d, const View& x) {
        if (d.kind != kStreamBinary) return;
        const StreamBinary b = d.get<StreamBinary>();
        if (!same_view(b.args.y, x) || b.copy || b.n_push || b.args.a.type != kF32 || b.args.b.type != kF32 || b.args.y.type != kF32) return;
        StreamElements e{};
        e.x = b.args.a, e.y = b.args.y, e.n_steps = 1;
        e.step[0].b = b.args.b, e.step[0].op = kStreamWithOther + b.op;
        Draft out = Draft::of(kStreamElements, e);
        out.reads = d.reads, out.writes = d.writes;
        d = std::move(out);
    }
    bool add_unary(const RankLaunch& l) {
        const UnaryArgs u = args_of<UnaryArgs>(l);
        i32 op = -1;
        for (size_t i = 0; i < std::size(kUnaryKernels); ++i)
            if (is(l, kUnaryKernels[i])) op = static_cast<i32>(i);
        if (op < 0) return false;
        if (op == static_cast<i32>(UnaryOp::kScale) && u.p1 == 0 && !stages.empty() && stages.back().kind == kStreamNormRows) {
            StreamNormRows n = stages.back().get<StreamNormRows>();
            if (same_view(n.norm.y, u.x) && same_view(u.x, u.y)) {
                n.factor *= u.p0;
                stages.back().set(n);
                return true;
            }
        }
        return add_element_op(u.x, u.y, {}, [&](StreamElements::Step& step) {
            step.op = op;
            step.p[0] = u.p0, step.p[1] = u.p1, step.p[2] = u.p2, step.p[3] = u.p3;
        });
    }
    bool add_rms_norm(const NormArgs& n) {
        const i64 k = n.y.ne[0];
        auto rows = [k](const View& v) {
            const bool fours = (reinterpret_cast<u64>(v.data) | static_cast<u64>(v.nb[1] | v.nb[2] | v.nb[3])) % 16 == 0;
            return v.type == kF32 && v.nb[0] == 4 && (k < kStreamLongRow || fours);
        };
        if (!rows(n.x) || !rows(n.y) || k % 4 || n_elements(n.y) > kMostElems || pending) return false;
        if (n.has_weight && (!is_vector(n.weight, k))) return false;
        FusedNormArgs f{};
        f.a = n.x, f.y = n.y, f.weight = n.weight, f.has_weight = n.has_weight, f.eps = n.eps;
        return add_norm(f);
    }
    bool add_copy(const CopyArgs& c) {
        const i64 n = n_elements(c.x);
        if (c.x.type != kF32 || c.y.type != kF32 || pending) return false;
        if (is_dense(c.x) && is_dense(c.y) && n <= kMostCopied && !meet({span_of(c.x)}, {span_of(c.y)})) {
            Draft d = Draft::of(kStreamCopy, StreamCopy{reinterpret_cast<const float*>(c.x.data), reinterpret_cast<float*>(c.y.data), n});
            d.reads = {span_of(c.x)}, d.writes = {span_of(c.y)};
            stages.push_back(std::move(d));
            return true;
        }
        // Elements in the order of their indices: those of one are those of the other.
        View x = c.x, y = c.y;
        if (!std::equal(x.ne, x.ne + 4, y.ne)) {
            if (is_dense(y)) reshape(y, x);
            else if (is_dense(x)) reshape(x, y);
            else return false;
        }
        if (n > kMostElems || meet({span_of(x)}, {span_of(y)})) return false;
        StreamElements e{};
        e.x = x, e.y = y;
        Draft d = Draft::of(kStreamElements, e);
        d.reads = {span_of(x)}, d.writes = {span_of(y)};
        stages.push_back(std::move(d));
        return true;
    }
    static void reshape(View& packed, const View& as) {
        i64 next = 4;  // bytes
        for (int d = 0; d < 4; ++d) packed.ne[d] = as.ne[d], packed.nb[d] = next, next *= as.ne[d];
    }
    bool add_concat(const MoveArgs& m) {
        if (m.bytes != 4 || n_elements(m.y) > kMostElems || pending) return false;
        Draft d = Draft::of(kStreamConcat, StreamConcat{m});
        d.reads = {span_of(m.x), span_of(m.b)}, d.writes = {span_of(m.y)};
        if (meet(d.reads, d.writes)) return false;
        stages.push_back(std::move(d));
        return true;
    }
    /// Of dimensions of one element, many times.
    bool add_repeat(const MoveArgs& m) {
        View x = m.x;
        for (int d = 0; d < 4; ++d) {
            if (x.ne[d] != m.y.ne[d] && x.ne[d] != 1) return false;
            if (x.ne[d] == 1) x.nb[d] = 0;
            x.ne[d] = m.y.ne[d];
        }
        if (x.type != kF32 || n_elements(m.y) > kMostElems || meet({span_of(m.x)}, {span_of(m.y)}) || pending) return false;
        StreamElements e{};
        e.x = x, e.y = m.y;
        Draft d = Draft::of(kStreamElements, e);
        d.reads = {span_of(m.x)}, d.writes = {span_of(m.y)};
        stages.push_back(std::move(d));
        return true;
    }
    bool add_conv(const BinaryArgs& c) {
        if (n_elements(c.y) > kMostElems || pending) return false;
        StreamElements e{};
        e.x = c.a, e.y = c.y, e.w = c.b;
        Draft d = Draft::of(kStreamElements, e);
        d.reads = {span_of(c.a), span_of(c.b)}, d.writes = {span_of(c.y)};
        if (meet(d.reads, d.writes)) return false;
        stages.push_back(std::move(d));
        return true;
    }
    bool add_delta(const RecurrentArgs& r) {
        if (!delta_in_fours(r) || pending) return false;
        Draft d = Draft::of(kStreamDelta, StreamDelta{r});
        for (int i = 0; i < 6; ++i) d.reads.push_back(i == 5 ? span_of(r.src[5].data, r.rows * r.n * r.n_head * 4) : span_of(r.src[i]));
        d.writes = {span_of(r.y, r.rows * r.n_head * 4)};
        if (r.snapshots > 0) d.writes.push_back(span_of(r.state, r.rows * r.n * r.n_head * 4));
        stages.push_back(std::move(d));
        return true;
    }

    /// The sum of a product's part, or of all ranks' products, and a vector: the stage stores it. 72B shape of Qwen2, one H100: three stages of a layer's
    /// thirteen less.
    bool add_bias(const BinaryArgs& sum) {
        const i64 n = sum.y.ne[0];
        if (!is_vector(sum.y, n) || !is_vector(sum.a, n) || !is_vector(sum.b, n)) return false;
        float* const y = reinterpret_cast<float*>(sum.y.data);
        const Span from = span_of(sum.a), to = span_of(sum.y);
        if (written(span_of(sum.b))) return false;  // it is read before the stage
        for (size_t i = stages.size(); i-- > 0;) {
            Draft& d = stages[i];
            if (meet({to}, d.reads)) return false;
            if (!meet({from}, d.writes)) {
                if (meet({to}, d.writes)) return false;
                continue;
            }
            auto take = [&](auto& result) {  // a StreamPart or a StreamReduce
                if (reinterpret_cast<char*>(result.y) != sum.a.data || result.n != n || result.copy || result.bias) return false;
                if (result.y != y) {
                    if (meet({to}, d.writes)) return false;
                    result.raw = result.y;
                    result.y = y;
                    d.writes.push_back(to);
                }
                result.bias = reinterpret_cast<const float*>(sum.b.data);
                return true;
            };
            if (d.kind == kStreamReduce) {
                StreamReduce r = d.get<StreamReduce>();
                const bool taken = take(r);
                d.set(r);
                return taken;
            }
            if (d.kind != kStreamProduct) return false;
            StreamProduct p = d.get<StreamProduct>();
            if (p.glu || p.role || p.n_push) return false;
            const bool taken = std::any_of(std::begin(p.part), std::end(p.part), take);
            d.set(p);
            return taken;
        }
        return false;
    }

    const StreamMemory::Rank* memory_;
    int n_ranks_;
    std::map<const char*, Recipe> recipes_;  // by the scratch that they would be written to
    const char* kept_ = nullptr;             // whose int8 the shared memory holds
    Copy last_sum_, last_norm_, last_logits_;
    StreamRoute route_{};  // of the last router, which chose by ids_ with weights_
    const char *ids_ = nullptr, *weights_ = nullptr;
    int next_sum_ = 0, next_added_ = 0, next_turned_ = 0;
    std::map<std::string, float*> tables_;
};

/// Where a launch writes int8 activations, or null.
const char* quantizes_to(const RankLaunch& l) {
    if (named(l, "fused_norm_pieces")) return args_of<PiecesNormArgs>(l).norm.xq;
    if (named(l, "fused_norm")) return args_of<FusedNormArgs>(l).xq;
    if (named(l, "quantize_x")) return args_of<QuantizeArgs>(l).xq;
    if (named(l, "fused_glu_")) return args_of<FusedGluArgs>(l).xq;
    if (named(l, "flash_combine")) return args_of<FlashCombineArgs>(l).xq;
    if (named(l, "chain")) return args_of<ChainArgs>(l).quantize.xq;
    return nullptr;
}

/// Steps [begin, end) as stages of every rank. The longest that all ranks can.
struct Run {
    size_t end = 0;
    std::vector<Stage> stages;
    std::vector<RankRun> ranks;
    int n_pushes = 0;
    size_t n_products = 0;
};

/// cautious: steps that a rank could not do as the others do, as a host's allocator puts its part elsewhere.
Run make_run(const std::vector<ProgramStep>& steps, size_t begin, const StreamMemory& memory, size_t most, const std::set<size_t>& cautious = {}) {
    Run run;
    const int n = static_cast<int>(memory.ranks.size());
    for (int r = 0; r < n; ++r) run.ranks.emplace_back(memory.ranks[static_cast<size_t>(r)], n);
    run.end = begin;
    size_t whole = begin;  // where the run may end
    for (size_t i = begin; i < std::min(most, steps.size()); ++i) {
        const ProgramStep& step = steps[i];
        bool ok = true;
        if (step.kind == ProgramStep::kAllReduce) {
            ok = memory.peers && step.wire == WireType::kF32;
            std::vector<u64*> inboxes;
            for (const auto& rank : memory.ranks) inboxes.push_back(rank.inbox);
            for (int r = 0; ok && r < n; ++r)
                ok = run.ranks[static_cast<size_t>(r)].add_reduce(step.pointers[static_cast<size_t>(r)], step.elems, inboxes, r, run.n_pushes + 1);
        } else {
            for (int r = 0; ok && r < n; ++r) {
                RankRun& rank = run.ranks[static_cast<size_t>(r)];
                rank.cautious = cautious.count(i) > 0;
                ok = rank.add(step.launches[static_cast<size_t>(r)]);
            }
            // The same stages on every rank: they count arrivals alike.
            bool alike = true;
            for (int r = 1; ok && r < n; ++r) {
                const auto &a = run.ranks[0].stages, &b = run.ranks[static_cast<size_t>(r)].stages;
                alike &= a.size() == b.size() && std::equal(a.end() - std::min<std::ptrdiff_t>(4, a.end() - a.begin()), a.end(),
                                                            b.end() - std::min<std::ptrdiff_t>(4, b.end() - b.begin()), [](const Draft& x, const Draft& y) {
                                                                return x.kind == y.kind;
                                                            });  // a step changes no more than that
            }
            if (!alike && !cautious.count(i)) {
                std::set<size_t> more = cautious;
                more.insert(i);
                return make_run(steps, begin, memory, most, more);
            }
            ok &= alike;
        }
        if (!ok) return make_run(steps, begin, memory, i, cautious);
        const size_t now = run.ranks[0].stages.size();
        const bool reduces = step.kind == ProgramStep::kAllReduce;
        run.n_pushes += reduces;
        if (run.stages.size() == now && now && step.label != run.stages.back().label) run.stages.back().label += ", " + step.label;
        while (run.stages.size() > now && run.stages.size() > 1) {  // a stage has taken those before it into itself
            const std::string label = run.stages.back().label;
            run.stages.pop_back();
            run.stages.back().label += ", " + label;
        }
        while (run.stages.size() < now) run.stages.push_back({step.label, false});
        if (reduces) run.stages.back().reduces = true;
        run.end = i + 1;
        if (std::none_of(run.ranks.begin(), run.ranks.end(), [](const RankRun& r) { return r.pending; })) whole = run.end;
    }
    if (whole < run.end) return make_run(steps, begin, memory, whole, cautious);
    for (const Draft& d : run.ranks.empty() ? std::vector<Draft>{} : run.ranks[0].stages) run.n_products += d.kind == kStreamProduct;
    return run;
}

/// The same joins on all ranks, or none: find(rank) is a Join, or has one, that is nobody else's.
template <class Find>
auto join_all(Run& run, const Find& find) {
    std::vector<std::decay_t<decltype(*find(run.ranks[0]))>> out;
    for (const RankRun& rank : run.ranks) {
        auto found = find(rank);
        if (!found) break;
        const Join& join = *found;
        if (!rank.is_own(join) || (!out.empty() && !join.is_like(out[0]))) break;
        out.push_back(std::move(*found));
    }
    if (out.size() < run.ranks.size()) {
        out.clear();
        return out;
    }
    const Join& join = out[0];
    for (size_t r = 0; r < run.ranks.size(); ++r) run.ranks[r].apply(out[r]);
    // What goes is named by the next stage that stays.
    std::string before;
    std::vector<Stage> stages;
    for (size_t i = 0; i < run.stages.size(); ++i) {
        Stage& stage = run.stages[i];
        if (join.takes(i)) {
            before += stage.label + ", ";
            continue;
        }
        if (join.change_of(i) || i + 1 == run.stages.size()) stage.label = std::exchange(before, "") + stage.label;
        stages.push_back(std::move(stage));
    }
    run.stages = std::move(stages);
    return out;
}
/// Linear attention's stages become one for each layer. From the last layer on: what one leaves out, a later one that was not joined writes over, so the last
/// one never is, as whoever comes behind the run may read what it leaves.
void join_heads(Run& run) {
    int turn = 0;
    for (size_t i = run.stages.size(); i-- > 0;) {
        if (run.ranks[0].stages[i].kind != kStreamDelta) continue;
        const std::vector<DeltaHeads> found = join_all(run, [&](const RankRun& rank) { return rank.heads_of(i, turn); });
        if (found.empty()) continue;
        turn ^= 1;
        // Its windows are brought up to date by the next such stage, if the row is still there, or by one of their own behind the product.
        size_t updates = found[0].place - found[0].taken.size() + 1;
        while (run.ranks[0].stages[updates].kind != kStreamProduct) ++updates;
        size_t behind = ++updates;
        while (behind < run.stages.size() && run.stages[behind].reduces) ++behind;
        const auto kept = [&](size_t stage) {
            for (size_t r = 0; r < run.ranks.size(); ++r)
                if (meet({span_of(found[r].shift.shift_row.row, 4)}, run.ranks[r].stages[stage].writes)) return false;
            return true;
        };
        while (updates < run.stages.size() && run.ranks[0].stages[updates].kind != kStreamHeads && kept(updates)) ++updates;
        const bool alone = updates == run.stages.size() || run.ranks[0].stages[updates].kind != kStreamHeads;
        if (alone) updates = behind, run.stages.insert(run.stages.begin() + static_cast<std::ptrdiff_t>(updates), {"windows", false});
        for (size_t r = 0; r < run.ranks.size(); ++r) {
            std::vector<Draft>& stages = run.ranks[r].stages;
            const auto at = stages.begin() + static_cast<std::ptrdiff_t>(updates);
            if (alone) stages.insert(at, Draft::of(kStreamHeads, StreamHeads{}));
            found[r].shift_in(stages[updates]);
        }
    }
}
/// Stage by stage, from the last on, what `find` finds there as often as it does.
template <class Find>
void join_each(Run& run, const Find& find) {
    for (size_t i = run.stages.size(); i-- > 0;)
        while (i < run.stages.size() && !join_all(run, [&](const RankRun& rank) { return find(rank, i); }).empty()) {}
}

/// The first step of the run whose int8 activations are read by a launch behind the run, or its end: such a step must run itself.
size_t end_of_kept_inputs(const std::vector<ProgramStep>& steps, size_t begin, size_t end) {
    std::vector<const char*> written_over;
    for (size_t i = end; i-- > begin;) {
        if (steps[i].kind != ProgramStep::kLaunch) continue;
        const char* xq = quantizes_to(steps[i].launches[0]);
        if (!xq || std::find(written_over.begin(), written_over.end(), xq) != written_over.end()) continue;
        written_over.push_back(xq);
        for (size_t j = end; j < steps.size(); ++j) {
            if (steps[j].kind != ProgramStep::kLaunch) continue;
            if (quantizes_to(steps[j].launches[0]) == xq) break;
            if (refers_to(steps[j].launches[0], xq)) return i;
        }
    }
    return end;
}

/// Whether its attentions have more cells than it gains with, where they cannot be streamed. None of the run is worth it then: a launch for what lies
/// behind the last attention cost more than it brought (8B, Q4_0, one H100, 32,000 cells: 240 tokens/s without, 193 to 213 with it; at 16,384 289, 271).
bool is_deep(const Run& run) {
    return std::any_of(run.ranks[0].stages.begin(), run.ranks[0].stages.end(), [](const Draft& d) {
        if (d.kind != kStreamFlash) return false;
        const StreamFlash f = d.get<StreamFlash>();
        return !f.cells.groups && f.args.a.k.ne[1] > kMostCells;
    });
}

/// Where the persistent kernel was faster than a launch per step (tokens/s with it, without; docs/decisions.md). One H100, 8B: Q4_0 444, 420;
/// Q8_0 275, 269; Q4_K 395, 378, of 72B's shape 218, 209; the other types 344, 331 (Q5_K) to 547, 414 (Q2_K). One H200, Q6_K alone: 8B 391, 372, at 16,384
/// cells 292, 253; 1B 1,594, 1,164. With experts it is ahead at any length: Qwen3-30B-A3B, Q4_K, 401, 255; at 8,192 cells 269, 210; at 16,384 205, 197; at
/// 32,000 173, 165.
bool gains(const Run& run) {
    if (run.n_products < kLeastProducts) return false;
    if (run.n_pushes > 0) return true;
    for (const Draft& d : run.ranks[0].stages)
        if (d.kind == kStreamProduct && d.get<StreamProduct>().role) return true;
    return !is_deep(run);
}

/// Who waits: a stage that reads what a stage before it wrote since the last wait, or writes what such a stage read or wrote. And a product
/// that pushes, when its rank has read an inbox since the last wait: so a peer that has all of this push knows that the push before is read
/// by every block here, and may push into that one's inbox again.
std::vector<bool> waits_of(const Run& run) {
    std::vector<bool> waits(run.stages.size());
    std::vector<std::vector<Span>> reads(run.ranks.size()), writes(run.ranks.size());
    bool inbox_read = false;
    for (size_t i = 0; i < run.stages.size(); ++i) {
        bool wait = inbox_read && i + 1 < run.stages.size() && run.stages[i + 1].reduces;
        for (size_t r = 0; r < run.ranks.size(); ++r) {
            const Draft& d = run.ranks[r].stages[i];
            wait |= meet(d.reads, writes[r]) || meet(d.writes, writes[r]) || meet(d.writes, reads[r]);
        }
        waits[i] = wait;
        inbox_read = run.stages[i].reduces || (inbox_read && !wait);
        for (size_t r = 0; r < run.ranks.size(); ++r) {
            const Draft& d = run.ranks[r].stages[i];
            if (wait) reads[r].clear(), writes[r].clear();
            reads[r].insert(reads[r].end(), d.reads.begin(), d.reads.end());
            writes[r].insert(writes[r].end(), d.writes.begin(), d.writes.end());
        }
    }
    return waits;
}

constexpr const char* kKindNames[] = {"product",   "reduce",  "copy",   "norm rows", "binary",   "turns",  "rope and store", "set_rows",        "get_rows",
                                      "attention", "combine", "floats", "glu",       "elements", "concat", "delta net",      "linear attention"};
std::string name_of(const Draft& d) {
    const bool streamed = d.kind == kStreamFlash && d.get<StreamFlash>().cells.groups;
    const bool latent = d.kind == kStreamFlash && d.get<StreamFlash>().latent.used;
    return std::string(latent ? "latent " : streamed ? "streamed " : "") + kKindNames[d.kind];
}
/// How a product's tiles come and, of experts' last products, which of the kernel's loops stores them: what a stage's time, or a test, is to be read by.
std::string tiles_of(const Draft& d) {
    if (d.kind != kStreamProduct) return "";
    const StreamProduct p = d.get<StreamProduct>();
    const WeightFormat* const format = find_weight_format(p.type);
    std::string out = " [" + std::string(format ? format->name : "?") + ", " + std::to_string(p.n_tiles) + " tiles of " + std::to_string(p.rows) + " rows";
    if (const i32 pieces = stream_tile_pieces(p); pieces > 1) out += " in " + std::to_string(pieces) + " pieces";
    if (p.role == kExpertsSum) {
        const bool more = p.part[0].bias || p.part[0].raw || d.get<StreamExperts>().sums.visible;
        out += " of " + std::to_string(p.slots) + " experts, " + (more ? "sums and more" : "sums alone") + " stored";
    }
    return out + "]";
}

}  // namespace

StreamMemory::StreamMemory(std::vector<std::unique_ptr<Device>>& devices, bool peers_in, double deadline)
    : peers(peers_in), inbox_words(static_cast<i64>(devices.size()) * kStreamMostK), deadline_s(deadline) {
    const i64 vector_bytes = kStreamMostK * 4;
    for (const auto& device : devices) {
        Rank rank;
        int sharing = 0;
        for (const auto& other : devices) sharing += other->ordinal == device->ordinal;
        rank.n_blocks = static_cast<u32>(std::max(device->n_sm / sharing, 1));
        rank.bytes = static_cast<size_t>(kAlign + kVectors * vector_bytes + (peers ? 2 * inbox_words * 8 : 0));
        rank.block = DeviceBlock(*device, rank.bytes);
        const DevicePtr base = rank.block.pointer();
        rank.state = reinterpret_cast<StreamState*>(base);
        for (int v = 0; v < kVectors; ++v) rank.vectors[v] = reinterpret_cast<float*>(base + static_cast<u64>(kAlign + v * vector_bytes));
        if (peers) rank.inbox = reinterpret_cast<u64*>(base + static_cast<u64>(kAlign + kVectors * vector_bytes));
        ranks.push_back(std::move(rank));
    }
    reset();
}

void StreamMemory::reset() const {
    for (const Rank& rank : ranks) {
        const Device& device = *rank.block.device();
        device.make_current();
        TP_CUDA(device.driver, device.rank, cuMemsetD8Async, rank.block.pointer(), 0, rank.bytes, device.stream);
        if (!device.wait(deadline_s)) throw Error("rank " + std::to_string(device.rank) + " did not clear its counters in time");
    }
}

bool can_persist(const std::vector<std::unique_ptr<Device>>& devices) {
    for (const auto& device : devices) {
        int shared = 0;
        TP_CUDA(device->driver, device->rank, cuDeviceGetAttribute, &shared, kAttributeSharedOptIn, device->ordinal);
        int cooperative = 0;
        TP_CUDA(device->driver, device->rank, cuDeviceGetAttribute, &cooperative, kAttributeCooperative, device->ordinal);
        if (device->cc < kStreamArch || shared < static_cast<int>(kStreamShared) || !cooperative) return false;
    }
    return true;
}

void persist(Program& program, std::vector<std::unique_ptr<Device>>& devices, const StreamMemory& memory, const std::vector<DevicePtr>& faults) {
    std::vector<ProgramStep> out;
    const size_t n = devices.size();
    for (size_t i = 0; i < program.steps.size();) {
        Run run = make_run(program.steps, i, memory, program.steps.size());
        const size_t kept = end_of_kept_inputs(program.steps, i, run.end);
        if (kept < run.end) run = make_run(program.steps, i, memory, kept);
        if (!gains(run)) {
            const size_t end = run.end > i && is_deep(run) ? run.end : i + 1;
            while (i < end) out.push_back(std::move(program.steps[i++]));
            continue;
        }
        join_heads(run);
        join_each(run, [](const RankRun& rank, size_t i) { return rank.latent_heads_of(i); });
        join_each(run, [](const RankRun& rank, size_t i) { return rank.shared_expert_of(i); });
        ProgramStep step;
        step.kind = ProgramStep::kLaunch;
        step.label = "stream of " + std::to_string(run.stages.size()) + " stages";
        for (size_t j = i; j < run.end; ++j) step.tensors.insert(step.tensors.end(), program.steps[j].tensors.begin(), program.steps[j].tensors.end());
        const std::vector<i64> table_bytes(n, static_cast<i64>(run.stages.size() * sizeof(StreamStage)));
        std::vector<DevicePtr> tables;
        const i64 times_bytes = round_up(static_cast<i64>(run.stages.size()) * kStreamTimes * 8, kAlign);
        for (size_t r = 0; r < n; ++r) {
            DeviceBlock block(*devices[r], static_cast<size_t>(table_bytes[r] + times_bytes + run.ranks[r].scratch_bytes + kAlign));
            tables.push_back(block.pointer());
            run.ranks[r].leave_out_dead();
            run.ranks[r].leave_out_unread();
            run.ranks[r].mark_visible();
            run.ranks[r].set_scratch(block.pointer() + static_cast<u64>(round_up(table_bytes[r], kAlign) + times_bytes));
            program.blocks.push_back(std::move(block));
        }
        const std::vector<bool> waits = waits_of(run);
        for (size_t s = 0; s < run.stages.size(); ++s)
            step.detail += std::string(run.stages[s].reduces ? "  == "
                                       : waits[s]            ? "  -- "
                                                             : "     ") +
                           name_of(run.ranks[0].stages[s]) + " " + run.stages[s].label + tiles_of(run.ranks[0].stages[s]) + "\n";
        for (size_t r = 0; r < n; ++r) {
            std::vector<StreamStage> stages(run.stages.size());
            for (size_t s = 0; s < stages.size(); ++s) {
                const Draft& d = run.ranks[r].stages[s];
                stages[s].kind = d.kind, stages[s].wait = waits[s], stages[s].count = d.count;
                stages[s].turn = static_cast<u16>(s * kTurn % memory.ranks[r].n_blocks);
                std::memcpy(stages[s].body, d.body.data(), d.body.size());
            }
            i32 product = static_cast<i32>(stages.size());
            for (size_t s = stages.size(); s-- > 0;) {
                stages[s].next_product = product;
                const Draft& d = run.ranks[r].stages[s];
                if (d.kind == kStreamProduct || (d.kind == kStreamFlash && d.get<StreamFlash>().cells.groups)) product = static_cast<i32>(s);
            }
            Device& device = *devices[r];
            device.make_current();
            TP_CUDA(device.driver, device.rank, cuMemcpyHtoDAsync, tables[r], stages.data(), stages.size() * sizeof(StreamStage), device.stream);
            if (!device.wait(memory.deadline_s)) throw Error("rank " + std::to_string(r) + " did not take a program in time");
            StreamArgs args{};
            args.stages = reinterpret_cast<const StreamStage*>(tables[r]);
            args.state = memory.ranks[r].state;
            args.fault = reinterpret_cast<u32*>(faults[r]);
            args.cycles = reinterpret_cast<u64*>(tables[r] + static_cast<u64>(round_up(table_bytes[r], kAlign)));
            args.n_stages = static_cast<i32>(stages.size());
            args.first_product = product;
            args.n_pushes = run.n_pushes;
            args.slots = stream_slots(std::any_of(run.ranks[r].stages.begin(), run.ranks[r].stages.end(),
                                                  [](const Draft& d) { return d.kind == kStreamProduct && has_grid(d.get<StreamProduct>().type); }));
            args.inbox_words = memory.inbox_words;
            args.deadline_ns = static_cast<u64>(memory.deadline_s * 1e9);
            RankLaunch launch;
            launch.launch = stream_launch(memory.ranks[r].n_blocks);
            launch.args.resize(sizeof args);
            std::memcpy(launch.args.data(), &args, sizeof args);
            step.launches.push_back(std::move(launch));
        }
        out.push_back(std::move(step));
        i = run.end;
    }
    program.steps = std::move(out);
}

std::string stage_times(const Program& program, const Device& device) {
    std::string out;
    for (const ProgramStep& step : program.steps) {
        if (step.detail.empty()) continue;
        const StreamArgs args = args_of<StreamArgs>(step.launches[static_cast<size_t>(device.rank)]);
        std::vector<u64> cycles(static_cast<size_t>(args.n_stages) * kStreamTimes);
        device.make_current();
        TP_CUDA(device.driver, device.rank, cuMemcpyDtoHAsync, cycles.data(), reinterpret_cast<DevicePtr>(args.cycles), cycles.size() * 8, device.stream);
        if (!device.wait(10)) throw Error("rank " + std::to_string(device.rank) + " did not return its times");
        size_t line = 0;
        for (int i = 0; i < args.n_stages; ++i) {
            const u64* t = cycles.data() + i * kStreamTimes;
            const size_t end = step.detail.find('\n', line);
            out += std::to_string(t[kTimeWaited] - t[kTimeBegin]) + " " + std::to_string(t[kTimeInput] - t[kTimeWaited]) + " " +
                   std::to_string(t[kTimeDone] - t[kTimeInput]) + " " + std::to_string(t[kTimeStored] > t[kTimeDone] ? t[kTimeStored] - t[kTimeDone] : 0) +
                   step.detail.substr(line, end - line) + "\n";
            line = end + 1;
        }
    }
    return out;
}

}  // namespace ggml_tp
