/* What tests and tools may ask of a loaded libggml-tp.so. Plain C, read by the core and by cffi alike: declarations only. */
struct ggml_tp_counters {
    uint64_t graphs_computed, programs_built, graph_launches_per_rank, weights_resharded;
    uint64_t last_all_reduces, last_all_gathers, last_kernel_launches;
    uint64_t programs_cached; /* captured and not yet dropped */
    uint64_t host_all_reduces; /* among groups, that the host asked for (-sm tensor) */
    uint64_t graphs_unread; /* of those computed: nobody reads their results, the host did not wait for them */
};
enum { GGML_TP_TEXT_CONFIG = 0, GGML_TP_TEXT_LAYOUT = 1, GGML_TP_TEXT_PLAN = 2, GGML_TP_TEXT_PROGRAM = 3, GGML_TP_TEXT_DEVICES = 4, GGML_TP_TEXT_STAGES = 5 };
/* Groups of ranks that hosts of this process have been given, each a device: of one host TP0, TP1, ... in this order. */
int ggml_tp_group_count(void);
int ggml_tp_rank_count(int group);
/* 0, or -1 when there is no such group. */
int ggml_tp_get_counters(int group, struct ggml_tp_counters *out);
/* Copies at most capacity bytes and a final 0; returns the length needed without it. The text of the last plan and program;
 * stages: where the last graph's time went in its persistent kernel: cycles waited, for the input, for the rest, and the stage. */
size_t ggml_tp_text(int group, int what, char *out, size_t capacity);
int ggml_tp_rank_bytes(int group, int rank, uint64_t *weight_bytes, uint64_t *kv_bytes, uint64_t *compute_bytes);
/* Bytes per second at which a rank's device reads memory (a kernel over bytes, best of rounds) and copies it (bytes read and written
 * both counted). 0, or -1 with a line on stderr when there is no such rank or no memory. Blocks the group while it measures. */
int ggml_tp_measure(int group, int rank, uint64_t bytes, int rounds, double *read_rate, double *copy_rate);
/* Seconds that an all_reduce of so many bytes of f32 takes on every rank's stream: rounds of them back to back, the best repetition.
 * 0; -1 with a line on stderr when it fails; -2 when this library cannot reduce that way. Blocks the group while it measures. */
enum { GGML_TP_REDUCE_NCCL = 0, GGML_TP_REDUCE_NCCL_GRAPH = 1, GGML_TP_REDUCE_NCCL_SYMMETRIC = 2, GGML_TP_REDUCE_PULL = 3, GGML_TP_REDUCE_PUSH = 4 /* our own, with residual, norm and halves of rows of 4096 */ };
int ggml_tp_time_all_reduce(int group, uint64_t bytes, int how, int rounds, double *seconds);
/* For tests: the rank's next graph begins that many seconds later, as a late peer's would. 0, or -1 when there is no such rank. */
int ggml_tp_delay(int group, int rank, double seconds);
/* What a group would make of a model, from its file's tensor list alone: no host, no device, no group. Shapes in ggml's order; of a
 * tensor with fewer axes, ne is 1 there. Only tensors that a host puts on the device are listed. */
struct ggml_tp_file_tensor { const char *name; int32_t type; int64_t ne[4]; };
struct ggml_tp_layer {
    int64_t n_head, n_head_kv, head_k, head_v, cells;
    int64_t cache_of; /* the layer whose cache this one reads, -1: its own */
    int32_t sparse_gate; /* whether only gates above a limit open, which hangs on all of a token's */
};
/* What no tensor says: norms subtract the mean; feed forward reads what attention reads, and is added to the residual first; no cache; no flash attention. */
enum {
    GGML_TP_LAYER_NORM = 1,
    GGML_TP_PARALLEL = 2,
    GGML_TP_RESIDUAL_FIRST = 4,
    GGML_TP_ENCODER = 8,
    GGML_TP_UNFUSED = 16
};
struct ggml_tp_model {
    const struct ggml_tp_file_tensor *tensors; size_t n_tensors;
    const struct ggml_tp_layer *layers; size_t n_layers;
    int64_t n_embd, n_expert_used;
    int32_t type_k, type_v; /* of the caches */
    int32_t traits;
};
/* The plan of one decoded token as JSON, {"error": ...} when there is none; split: n_ranks shares, or null for an even one. Copies at most
 * capacity bytes and a final 0; returns the length needed without it. */
size_t ggml_tp_explain(const struct ggml_tp_model *model, int n_ranks, const double *split, char *out, size_t capacity);
const char *ggml_tp_version(void);
