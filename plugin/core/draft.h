// A stage of the persistent kernel while its table is being made: what it does, and which memory that reads and writes.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "stream.h"

namespace ggml_tp {

struct Span {
    u64 begin, end;
    bool meets(const Span& o) const { return begin < o.end && o.begin < end; }
};
inline Span span_of(const void* data, i64 bytes) { return {reinterpret_cast<u64>(data), reinterpret_cast<u64>(data) + static_cast<u64>(bytes)}; }
inline Span span_of(const View& v) {
    i64 bytes = v.type == kF16 || v.type == kBF16 ? 2 : v.type == kI64 ? 8 : 4;
    for (int d = 0; d < 4; ++d) bytes += (v.ne[d] - 1) * v.nb[d];
    return span_of(v.data, bytes);
}
inline bool meet(const std::vector<Span>& a, const std::vector<Span>& b) {
    return std::any_of(a.begin(), a.end(), [&](const Span& x) { return std::any_of(b.begin(), b.end(), [&](const Span& y) { return x.meets(y); }); });
}

/// One stage of one rank while the table is being made.
struct Draft {
    i32 kind = kStreamProduct, count = 0;
    std::vector<char> body;
    std::vector<Span> reads, writes;

    template <class T>
    static Draft of(i32 kind, const T& body) {
        static_assert(sizeof(T) <= sizeof(StreamStage::body));
        Draft d;
        d.kind = kind;
        d.body.resize(sizeof body);
        std::memcpy(d.body.data(), &body, sizeof body);
        return d;
    }
    template <class T>
    T get() const {
        T out;
        std::memcpy(&out, body.data(), sizeof out);
        return out;
    }
    template <class T>
    void set(const T& value) {
        std::memcpy(body.data(), &value, sizeof value);
    }
};
/// Stages of one rank that become fewer.
struct Join {
    std::vector<size_t> taken;                      // those that go, in order
    std::vector<std::pair<size_t, Draft>> changed;  // what others become, which read what is right for them
    std::vector<std::pair<size_t, Span>> left;      // what is written no more, by whom: it must have been for these stages alone

    const Draft* change_of(size_t i) const {
        for (const auto& [at, draft] : changed)
            if (at == i) return &draft;
        return nullptr;
    }
    bool takes(size_t i) const { return std::binary_search(taken.begin(), taken.end(), i); }
    /// Whether other ranks' stages become the same.
    bool is_like(const Join& other) const {
        return taken == other.taken && std::equal(changed.begin(), changed.end(), other.changed.begin(), other.changed.end(),
                                                  [](const auto& a, const auto& b) { return a.first == b.first; });
    }
};

inline bool is_vector(const View& v, i64 n) {
    return v.type == kF32 && v.ne[0] == n && v.ne[1] * v.ne[2] * v.ne[3] == 1 && v.nb[0] == 4 && reinterpret_cast<u64>(v.data) % 16 == 0;
}
/// n elements side by side, whatever the dimensions.
inline bool is_packed(const View& v, i64 n) {
    return v.type == kF32 && v.nb[0] == 4 && v.ne[0] * v.ne[1] == n && v.ne[2] * v.ne[3] == 1 && (v.ne[1] == 1 || v.nb[1] == v.ne[0] * 4);
}
/// All elements of F32 side by side, in the order of their indices.
inline bool is_dense(const View& v) {
    i64 next = 4;
    for (int d = 0; d < 4; ++d) {
        if (v.ne[d] > 1 && v.nb[d] != next) return false;
        next *= v.ne[d];
    }
    return v.type == kF32;
}

}  // namespace ggml_tp
