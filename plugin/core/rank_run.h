// One rank's reading of a run of launches as stages of the persistent kernel.
#pragma once
#include <cstring>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "delta_heads.h"
#include "draft.h"
#include "latent_heads.h"
#include "persist.h"
#include "shared_expert.h"

namespace ggml_tp {

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
    kOnes,  // the weights of heads' norms that have none
    kTables,
    kVectors
};
constexpr i64 kMostTables = 4, kTableFloats = kStreamMostK / kMostTables;  // kinds of rope in one program

/// A token's activations on their way to a product: how its input comes about. Bound to the scratch memory that a launch of its own would
/// have written them to as int8.
struct Recipe {
    i32 input = kInputKept;
    const float *a = nullptr, *b = nullptr, *weight = nullptr;
    float *sum = nullptr, *norm = nullptr;
    float eps = 0;
    i64 k = 0;
    const float* sum_factor = nullptr;
    bool weighed = false;  // `sum` is a, times an expert's weight
    bool used = false;     // a second reader finds the int8 in shared memory, or runs as a launch of its own
};

/// One rank's reading of a run of steps. add() is called with the steps in order; false: this step ends the run (and this object is of no
/// more use: the run is read again up to here).
class RankRun {
  public:
    RankRun(const StreamMemory::Rank& memory, int n_ranks) : memory_(&memory), n_ranks_(n_ranks) {}

    std::vector<Draft> stages;  // what has been drafted; a step adds none, one or more
    bool cautious = false;      // the next step does only what it could do wherever a host's allocator puts things

    bool add(const RankLaunch& l);
    /// The stage that has computed what is to be reduced: a product, a sum, or sums of squares, of which no later stage reads or writes anything.
    std::optional<size_t> summand_of(DevicePtr y, i64 elems) const;
    /// Whether all that the last stage does is to multiply a summand by a factor: what is reduced may be multiplied as well, so take_scale() takes it away.
    bool is_scaled(DevicePtr y, i64 elems) const;
    void take_scale();
    /// The all_reduce of it, as stage `at` behind the one that computed it. inboxes: of every rank.
    bool add_reduce(DevicePtr y, i64 elems, const std::vector<u64*>& inboxes, int rank, size_t at);
    /// Numbers of pushes, in the order of stages.
    void number_pushes();
    /// A stage that does nothing where another rank has one of this kind, which adds what one rank alone adds to a summand. False: of a kind that always does.
    bool idle(i32 kind);
    /// What a product's blocks write of their input for others, and what they write at last, may lie in the same memory, when the host's
    /// allocator gives a result what nobody reads any more: a slow block's norm would come to lie over a fast block's results.
    void leave_out_dead();
    /// What a stage writes for whoever else may read it is left out where nobody does: a later stage of the run writes all of that memory anew, and none
    /// before it reads of it. What a launch behind the run or the host reads stays, as no stage writes over it.
    void leave_out_unread();
    /// Whether what a join's stages no longer write was theirs alone: it is all written over later, and not read before.
    bool is_own(const Join& join) const;
    void apply(const Join& join);
    std::optional<DeltaHeads> heads_of(size_t delta, bool keep_rows, int turn) const;
    std::optional<Join> latent_heads_of(size_t i) const;
    std::optional<Join> shared_expert_of(size_t i) const;
    /// When all that is left out is left out.
    void mark_visible();
    // An attention waits for its combination, or a router and its experts' gate and up for what follows: no place to end a run at.
    bool pending = false;
    static bool pushes(const Draft& d);
    i64 scratch_bytes = 0;  // of attention's pieces; offsets into it stand in the drafts until set_scratch
    void set_scratch(DevicePtr base);

  private:
    static i64 slots_before(const StreamProduct& p);
    /// A pointer within a stage's body to F32 or I32 elements that it writes.
    struct Result {
        void** at;
        i64 elems;
        Span span() const { return *at ? span_of(*at, elems * 4) : Span{0, 0}; }
    };
    std::vector<Result> optional_results(size_t i);
    static std::vector<Span> written_whole(const Draft& d);
    static std::vector<Span> without(const std::vector<Span>& spans, const Span& cut);
    void forget(size_t i, const Result& result);
    bool written(const Span& span) const;

    // rank_run_products.cpp
    bool add_norm(const FusedNormArgs& n);
    bool add_quantize(const QuantizeArgs& q);
    std::optional<size_t> lone_norm(const float* y, i64 k) const;
    bool bind(const char* xq, const Recipe& recipe);
    static bool independent(const Draft& a, const Draft& b);
    static Recipe recipe_of(const FusedNormArgs& n);
    bool add_glu(const RankLaunch& l);
    static i32 glu_op(const RankLaunch& l);
    bool add_lone_glu(const RankLaunch& l, const FusedGluArgs& g);
    bool join_glu(const RankLaunch& l, const FusedGluArgs& g);
    bool map_experts(const View& x, i32 op);
    bool bind_experts(const QuantizeArgs& q);
    bool add_product(const MulVecArgs& m);
    static bool set_rows_of(StreamProduct& p, const Matrix& w, bool first);
    void give_input(StreamProduct& p, const Recipe& of, Draft& d, bool norms_b);
    void take_norm_of_b(StreamProduct& p, i64 k);
    std::vector<Draft> take_factor(Recipe& r);
    bool add_bias(const BinaryArgs& sum);
    struct Copy {
        const float* host = nullptr;
        float* copy = nullptr;
    };
    bool still(const Copy& c, const float* from, i64 n) const;
    bool take_copy(const float*& from, i64 k);
    float* free_vector(size_t i, i64 n, int turn, int vectors, int n_vectors) const;
    float* copy_of_output(const float* y, i64 n, int& turn, int vectors, int n_vectors, size_t end = SIZE_MAX);

    // rank_run_experts.cpp
    bool add_one_row(const MulMatArgs& m);
    bool add_floats(const MulVecArgs& m, bool is_router);
    static std::vector<Result> results_of(StreamRoute& r);
    static const char* take_groups(StreamRoute& r, const ChainArgs& c, int& at, const char* by);
    bool add_router(const ChainArgs& c);
    bool add_heads(const MulVecIdArgs& m);
    bool add_experts(const MulVecIdArgs& m);
    bool add_sum(const RankLaunch& l);
    bool repeat_input(const MoveArgs& m);
    bool add_weighed(const RankLaunch& l);
    bool weigh_input(const BinaryArgs& b);
    bool bind_weighed(const QuantizeArgs& q);
    static bool is_slots(const View& v, i64 n, i64 slots);

    // rank_run_attention.cpp
    bool add_flash(FlashSplitArgs f);
    void push_attention(Draft d);
    bool add_latent(const FlashSplitArgs& f);
    bool own_cells(StreamFlash& f) const;
    bool take_own_token(StreamFlash& f, Draft& out);
    std::optional<size_t> head_norm(const View& x, const View& like) const;
    bool norm_before_rope(const FusedNormArgs& n);
    bool store_with_rope(const SetRowsArgs& store);
    bool add_combine(FlashCombineArgs c);
    float* table_of(const RopeArgs& rope);
    bool add_rope(const RankLaunch& l);

    // rank_run_elements.cpp
    bool add_set_rows(const SetRowsArgs& a);
    bool add_get_rows(const GetRowsArgs& a);
    bool add_binary(const RankLaunch& l);
    template <class Add>
    bool add_element_op(const View& x, const View& y, const std::vector<View>& others, const Add& add);
    static void make_elements(Draft& d, const View& x);
    bool add_unary(const RankLaunch& l);
    bool add_rms_norm(const NormArgs& n);
    bool add_squares(const RowSquaresArgs& a);
    bool add_norm_by_squares(const NormBySquaresArgs& n);
    void insert_norm(Draft d);
    bool add_layer_norm(const NormArgs& n);
    bool join_layer_norm(const BinaryArgs& b, int op);
    bool add_copy(const CopyArgs& c);
    bool move_experts(const char* from, char* to, i64 n);
    static void reshape(View& packed, const View& as);
    bool add_concat(const MoveArgs& m);
    bool add_repeat(const MoveArgs& m);
    bool add_conv(const BinaryArgs& c);
    bool add_delta(const RecurrentArgs& r);
    bool add_scan(const RecurrentArgs& r);
    bool add_plain_glu(const RankLaunch& l);

    const StreamMemory::Rank* memory_;
    int n_ranks_;
    std::map<const char*, Recipe> recipes_;  // by the scratch that they would be written to
    const char* kept_ = nullptr;             // whose int8 the shared memory holds
    Copy last_sum_, last_norm_, last_logits_;
    StreamRoute route_{};  // of the last router, which chose by ids_ with weights_
    const char *ids_ = nullptr, *weights_ = nullptr;
    struct {
        const float* x = nullptr;
        char* y = nullptr;
        i64 k = 0;
        bool weighed = false, bound = false;
    } input_;                             // of the last router's one expert: y is x, then x times its weight
    float scale_ = 1.0f;                  // of what is reduced next
    std::optional<MulVecIdArgs> summed_;  // a product of experts whose sums are not all there yet
    int next_sum_ = 0, next_added_ = 0, next_turned_ = 0;
    std::map<std::string, float*> tables_;
};

/// Whether a launch's kernel has a name that begins so, or this name.
inline bool named(const RankLaunch& l, const char* prefix) { return l.launch.kernel && std::strncmp(l.launch.kernel, prefix, std::strlen(prefix)) == 0; }
inline bool is(const RankLaunch& l, const char* kernel) { return l.launch.kernel && std::strcmp(l.launch.kernel, kernel) == 0; }
constexpr i64 kAlign = 256;  // of what blocks of memory are cut into
inline i64 round_up(i64 value, i64 to) { return (value + to - 1) / to * to; }
constexpr i64 kMostElems = 1 << 17;  // of an element-wise stage: more is no token's work

}  // namespace ggml_tp
