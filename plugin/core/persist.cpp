#include "persist.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>

#include "rank_run.h"

namespace ggml_tp {
namespace {

constexpr int kAttributeCooperative = 95;  // CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH
constexpr int kAttributeSharedOptIn = 97;  // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
constexpr i64 kMostCells =
    8192;  // where cells cannot be streamed: at 32768 a kernel per step is ahead (8B, Q4_0, one H100: 228 tokens/s, 200), at 256 behind (403, 448)
// Of a run, a dense layer's: two between the launches of experts lose (Qwen3-30B-A3B, Q4_K, H100: one rank 253 tokens/s without, 223; two 248, 218).
constexpr size_t kLeastProducts = 4;
constexpr size_t kTurn = 29;  // blocks, by which a stage of little work begins behind the one before

struct Stage {
    std::string label;
    bool reduces = false;  // waits for what peers push
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

/// An all_reduce as a stage behind the one that has computed every rank's summand. False: there is no such stage.
bool reduce(Run& run, const ProgramStep& step, const StreamMemory& memory) {
    if (!memory.peers || step.wire != WireType::kF32) return false;
    const auto ranks = [&](const auto& does) {  // does(rank, its number)
        for (size_t r = 0; r < run.ranks.size(); ++r)
            if (!does(run.ranks[r], r)) return false;
        return true;
    };
    std::string label = step.label;
    if (ranks([&](const RankRun& rank, size_t r) { return rank.is_scaled(step.pointers[r], step.elems); })) {
        for (RankRun& rank : run.ranks) rank.take_scale();
        label = run.stages.back().label + ", " + label;
        run.stages.pop_back();
    }
    size_t at = 0;
    const bool there = ranks([&](const RankRun& rank, size_t r) {
        const std::optional<size_t> summand = rank.summand_of(step.pointers[r], step.elems);
        if (summand) at = std::max(at, *summand + 1);
        return summand.has_value();
    });
    std::vector<u64*> inboxes;
    for (const auto& rank : memory.ranks) inboxes.push_back(rank.inbox);
    if (!there || !ranks([&](RankRun& rank, size_t r) { return rank.add_reduce(step.pointers[r], step.elems, inboxes, static_cast<int>(r), at); }))
        return false;
    run.stages.insert(run.stages.begin() + static_cast<std::ptrdiff_t>(at), {label, true});
    ++run.n_pushes;
    return true;
}

/// What one rank alone adds to its summand may be a stage of its own, which ranks without a launch do nothing in. False: it is no such stage.
bool idle_with_others(Run& run, const ProgramStep& step) {
    const auto shorter = [](const RankRun& a, const RankRun& b) { return a.stages.size() < b.stages.size(); };
    const std::vector<Draft>& longest = std::max_element(run.ranks.begin(), run.ranks.end(), shorter)->stages;
    for (size_t r = 0; r < run.ranks.size(); ++r) {
        std::vector<Draft>& own = run.ranks[r].stages;
        if (!step.launches[r].launch.kernel)
            while (own.size() < longest.size())
                if (!run.ranks[r].idle(longest[own.size()].kind)) return false;
    }
    return true;
}

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
            ok = reduce(run, step, memory);
        } else {
            for (int r = 0; ok && r < n; ++r) {
                RankRun& rank = run.ranks[static_cast<size_t>(r)];
                rank.cautious = cautious.count(i) > 0;
                ok = rank.add(step.launches[static_cast<size_t>(r)]);
            }
            ok = ok && idle_with_others(run, step);
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
        if (step.kind == ProgramStep::kLaunch && run.stages.size() == now && now && step.label != run.stages.back().label)
            run.stages.back().label += ", " + step.label;
        while (run.stages.size() > now && run.stages.size() > 1) {  // a stage has taken those before it into itself
            const std::string label = run.stages.back().label;
            run.stages.pop_back();
            run.stages.back().label += ", " + label;
        }
        while (run.stages.size() < now) run.stages.push_back({step.label, false});
        run.end = i + 1;
        if (std::none_of(run.ranks.begin(), run.ranks.end(), [](const RankRun& r) { return r.pending; })) whole = run.end;
    }
    if (whole < run.end) return make_run(steps, begin, memory, whole, cautious);
    for (RankRun& rank : run.ranks) rank.number_pushes();
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
        if (const i32 kind = run.ranks[0].stages[i].kind; kind != kStreamDelta && kind != kStreamScan) continue;
        std::vector<DeltaHeads> found;
        for (const bool keep_rows : {false, true})
            if (found.empty()) found = join_all(run, [&](const RankRun& rank) { return rank.heads_of(i, keep_rows, turn); });
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
        bool wait = inbox_read && std::any_of(run.ranks.begin(), run.ranks.end(), [&](const RankRun& rank) { return RankRun::pushes(rank.stages[i]); });
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

constexpr const char* kKindNames[] = {"product",          "reduce",     "copy",    "norm rows",       "binary", "turns",    "rope and store", "set_rows",
                                      "get_rows",         "attention",  "combine", "floats",          "glu",    "elements", "concat",         "delta net",
                                      "linear attention", "layer norm", "squares", "norm by squares", "scan"};
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
        const bool more = p.part[0].bias || p.part[0].raw || p.weighed || d.get<StreamExperts>().sums.visible;
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
        const std::vector<float> ones(kFlashHead, 1.0f);
        TP_CUDA(device.driver, device.rank, cuMemcpyHtoDAsync, reinterpret_cast<DevicePtr>(rank.vectors[kOnes]), ones.data(), ones.size() * 4, device.stream);
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
