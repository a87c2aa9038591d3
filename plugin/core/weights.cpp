#include "weights.h"

#include <span>

namespace ggml_tp {
namespace {

struct Row {
    std::string_view suffix;
    Role role;
};

// Matched against the end of the name after its block prefix ("blk.7.", "dec.blk.7."), longest rows first where one ends another.
constexpr Row kRows[] = {
    {"attn_q.weight", Role::kColumn},
    {"attn_q.bias", Role::kColumn},
    {"attn_k.weight", Role::kColumn},
    {"attn_k.bias", Role::kColumn},
    {"attn_v.weight", Role::kColumn},
    {"attn_v.bias", Role::kColumn},
    {"attn_output.weight", Role::kRow},
    {"attn_o.weight", Role::kRow},
    {"cross_attn_q.weight", Role::kColumn},
    {"cross_attn_k.weight", Role::kColumn},
    {"cross_attn_v.weight", Role::kColumn},
    {"cross_attn_o.weight", Role::kRow},
    {"ffn_gate.weight", Role::kColumn},
    {"ffn_gate.bias", Role::kColumn},
    {"ffn_up.weight", Role::kColumn},
    {"ffn_up.bias", Role::kColumn},
    {"ffn_down.weight", Role::kRow},
    {"output.weight", Role::kColumn},
    {"token_embd.weight", Role::kColumn},
    // Experts are divided along their ffn axis, each on every rank; whoever routes does so alike on all ranks.
    {"ffn_gate_exps.weight", Role::kColumn},
    {"ffn_up_exps.weight", Role::kColumn},
    {"ffn_down_exps.weight", Role::kRow},
    {"ffn_gate_shexp.weight", Role::kColumn},
    {"ffn_up_shexp.weight", Role::kColumn},
    {"ffn_down_shexp.weight", Role::kRow},
    {"ffn_gate_inp.weight", Role::kWhole},
    // A second set of small experts (GroveMoE), and the narrow products around experts of a latent (Nemotron 3).
    {"ffn_gate_chexps.weight", Role::kColumn},
    {"ffn_up_chexps.weight", Role::kColumn},
    {"ffn_down_chexps.weight", Role::kRow},
    {"ffn_latent_down.weight", Role::kWhole},
    {"ffn_latent_up.weight", Role::kWhole},
    // Gemma 3n and 4: embeddings of every layer's own, and what they gate; narrow, and between norms of whole rows.
    {"per_layer_model_proj.weight", Role::kWhole},
    {"inp_gate.weight", Role::kWhole},
    {"proj.weight", Role::kWhole},
    {"laurel_l.weight", Role::kWhole},
    {"laurel_r.weight", Role::kWhole},
    {"attn_qkv.weight", Role::kSegments},
    // Latent attention: heads come out of the second of two products, the latent itself is everybody's.
    {"attn_q_a.weight", Role::kWhole},
    {"attn_kv_a_mqa.weight", Role::kWhole},
    {"attn_q_b.weight", Role::kColumn},
    {"attn_k_b.weight", Role::kWhole},
    {"attn_v_b.weight", Role::kWhole},
    {"attn_kv_b.weight", Role::kColumn},
    // What chooses the cells that an attention reads (DeepSeek-V3.2, GLM-5): all of its heads add up to one score, which every rank needs.
    {"indexer.attn_k.weight", Role::kWhole},
    {"indexer.attn_q_b.weight", Role::kWhole},
    {"indexer.proj.weight", Role::kWhole},
    {"indexer.k_proj.weight", Role::kWhole},
    {"indexer.q_proj.weight", Role::kWhole},
    {"indexer_compressor_kv.weight", Role::kWhole},
    {"indexer_compressor_gate.weight", Role::kWhole},
    {"ffn_gate_up_exps.weight", Role::kSegments},
    // Recurrent layers: what comes in of all heads (or channels), side by side where it is fused, and what goes out.
    {"ssm_in.weight", Role::kMixer},
    {"ssm_alpha.weight", Role::kMixer},
    {"ssm_beta.weight", Role::kMixer},
    {"ssm_ba.weight", Role::kWhole},
    {"attn_gate.weight", Role::kMixer},
    {"ssm_dt.weight", Role::kMixer},
    {"ssm_f_b.weight", Role::kMixer},
    {"ssm_g_b.weight", Role::kMixer},
    {"ssm_f_a.weight", Role::kWhole},
    {"ssm_g_a.weight", Role::kWhole},
    {"ssm_x.weight", Role::kWhole},
    {"shortconv.in_proj.weight", Role::kMixer},
    {"shortconv.out_proj.weight", Role::kRow},
    {"time_mix_receptance.weight", Role::kMixer},
    {"time_mix_key.weight", Role::kMixer},
    {"time_mix_value.weight", Role::kMixer},
    {"time_mix_gate.weight", Role::kMixer},
    {"time_mix_a2.weight", Role::kMixer},
    {"time_mix_w2.weight", Role::kMixer},
    {"time_mix_v2.weight", Role::kMixer},
    {"time_mix_g2.weight", Role::kMixer},
    {"time_mix_decay_w2.weight", Role::kMixer},
    {"time_mix_output.weight", Role::kRow},
    {"time_mix_w1.weight", Role::kWhole},
    {"time_mix_decay_w1.weight", Role::kWhole},
    {"time_mix_a1.weight", Role::kWhole},
    {"time_mix_v1.weight", Role::kWhole},
    {"time_mix_g1.weight", Role::kWhole},
    {"channel_mix_receptance.weight", Role::kWhole},
    {"channel_mix_key.weight", Role::kColumn},
    {"channel_mix_value.weight", Role::kRow},
    {"ssm_out.weight", Role::kRow},
};

}  // namespace

Role role_of(std::string_view name) {
    if (name.starts_with("cache_k_l") || name.starts_with("cache_v_l")) return Role::kKvCache;
    if (name.starts_with("cache_r_l") || name.starts_with("cache_s_l")) return Role::kState;
    if (name.starts_with("enc.") || name.starts_with("dec.")) name.remove_prefix(4);
    if (name.starts_with("blk.")) {
        const size_t dot = name.find('.', 4);
        if (dot == std::string_view::npos) return Role::kReplicated;
        name.remove_prefix(dot + 1);
    }
    for (const Row& row : kRows)
        if (name == row.suffix) return row.role;
    return Role::kReplicated;
}

Sharding guess_sharding(Role role, const i64 ne[4], int n_dims, int n_ranks, const std::vector<double>& split) {
    if (n_ranks == 1 || role == Role::kReplicated || role == Role::kWhole || role == Role::kState) return replicated();
    if (role == Role::kMixer && n_dims > 2) return replicated();  // RWKV 6 mixes all of a token with the one before by such a weight
    if (role == Role::kSegments) {
        // Experts have two halves. Of Q, K and V, Q is mostly as wide as the input, K and V share the rest; where not, the first plan knows better.
        const i64 halves[] = {ne[1] / 2, ne[1] / 2}, heads[] = {ne[0], (ne[1] - ne[0]) / 2, (ne[1] - ne[0]) / 2};
        const bool is_qkv = n_dims == 2;
        if (is_qkv ? ne[1] <= ne[0] || (ne[1] - ne[0]) % 2 : ne[1] % 2) return replicated();
        std::vector<Ranges> segments;
        i64 begin = 0;
        for (const i64 n : is_qkv ? std::span<const i64>(heads) : std::span<const i64>(halves)) {
            const i64 one[4] = {ne[0], n, ne[2], ne[3]};
            segments.push_back(moved(guess_sharding(Role::kColumn, one, n_dims, n_ranks, split).ranges, begin));
            begin += n;
        }
        return sharded(1, segments[0], {segments.begin() + 1, segments.end()});
    }
    int axis = 0;
    if (role == Role::kColumn || role == Role::kMixer) axis = n_dims > 1 ? 1 : 0;
    const i64 total = ne[axis];
    // Heads are not known yet: an even cut is right whenever the heads divide evenly; otherwise 64 is the commonest head's divisor. Experts have
    // none, and are narrow (192 at 5 ranks would leave two of them idle): 32, the commonest block.
    const i64 unit = n_dims == 3 && role != Role::kKvCache ? 32 : 64;
    const i64 grain = split.empty() && total % n_ranks == 0 ? total / n_ranks : total % unit == 0 ? unit : 1;
    return sharded(axis, divide(total, grain, n_ranks, split));
}

}  // namespace ggml_tp
