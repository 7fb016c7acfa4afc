// Attention of single new tokens to the keys and values of their texts, which lie in one cache.
//
// HEAD_DIM is the size of a head, a multiple of 16.

#include <limits>

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

constexpr int PARTS = HEAD_DIM / LANES;
constexpr int BLOCK = 256; // keys whose scores are held at once
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

inline Vector sums_of_pairs(Vector a, Vector b) {
    const Vector even =
        __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const Vector odd =
        __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return even + odd;
}

// Adds up the lanes of each of 16 vectors: lane i of the result is the sum of vector i.
inline Vector sums_of(Vector *vectors) {
    for (int left = LANES / 2; left; left /= 2)
        for (int i = 0; i < left; i++) vectors[i] = sums_of_pairs(vectors[2 * i], vectors[2 * i + 1]);
    return vectors[0];
}

// Queries of some heads, and their products with a key, spread over lanes.
template <int HEADS, typename T> struct Queries {
    Vector numbers[HEADS][PARTS];

    explicit Queries(const T *from) {
        for (int head = 0; head < HEADS; head++)
            for (int part = 0; part < PARTS; part++) numbers[head][part] = load(from + head * HEAD_DIM + part * LANES);
    }

    void multiply(const T *key, Vector *sums) const {
        for (int part = 0; part < PARTS; part++) {
            const Vector of_key = load(key + part * LANES);
            for (int head = 0; head < HEADS; head++) sums[head] += numbers[head][part] * of_key;
        }
    }
};

#if defined(__AVX512BF16__) && HEAD_DIM % 32 == 0
// The processor multiplies pairs of bf16, and adds them up in fp32.
template <int HEADS> struct Queries<HEADS, bf16> {
    static constexpr int PAIRS = 2 * LANES;
    __m512bh numbers[HEADS][HEAD_DIM / PAIRS];

    explicit Queries(const bf16 *from) {
        for (int head = 0; head < HEADS; head++)
            for (int part = 0; part < HEAD_DIM / PAIRS; part++)
                numbers[head][part] = (__m512bh)_mm512_loadu_si512(from + head * HEAD_DIM + part * PAIRS);
    }

    void multiply(const bf16 *key, Vector *sums) const {
        for (int part = 0; part < HEAD_DIM / PAIRS; part++) {
            const __m512bh of_key = (__m512bh)_mm512_loadu_si512(key + part * PAIRS);
            for (int head = 0; head < HEADS; head++)
                sums[head] = (Vector)_mm512_dpbf16_ps((__m512)sums[head], numbers[head][part], of_key);
        }
    }
};
#endif

// Query heads that share their keys and values, with their softmax so far.
template <int HEADS> struct Group {
    Vector sums[HEADS][PARTS] = {};
    alignas(64) float weights[HEADS][BLOCK];
    float most[HEADS];
    float total[HEADS] = {};

    template <typename T> void score(const Queries<HEADS, T> &queries, const T *keys, int count, float scale) {
        for (int first = 0; first < count; first += LANES) {
            Vector products[HEADS][LANES];
            for (int i = 0; i < LANES; i++) {
                Vector sum[HEADS] = {};
                queries.multiply(keys + std::min(first + i, count - 1) * HEAD_DIM, sum);
                for (int head = 0; head < HEADS; head++) products[head][i] = sum[head];
            }
            for (int head = 0; head < HEADS; head++) store(weights[head] + first, sums_of(products[head]) * scale);
        }
        for (int head = 0; head < HEADS; head++)
            for (int i = count; i % LANES; i++) weights[head][i] = NOTHING;
    }

    // Turns scores into weights against the largest score so far, and what was added up before likewise.
    void weigh(int head, int count, bool is_first) {
        Vector tops = load(weights[head]);
        for (int i = LANES; i < count; i += LANES) {
            const Vector scores = load(weights[head] + i);
            tops = scores > tops ? scores : tops;
        }
        const float top = std::max(most[head], most_of(tops));
        Vector sum = {};
        for (int i = 0; i < count; i += LANES) {
            Vector scores = load(weights[head] + i);
            const Vector powers = exponential(scores - top);
            const Vector numbers = scores == NOTHING ? Vector{} : powers;
            store(weights[head] + i, numbers);
            sum += numbers;
        }
        const float before = is_first ? 0 : std::exp(most[head] - top);
        total[head] = total[head] * before + sum_of(sum);
        most[head] = top;
        for (int part = 0; part < PARTS; part++) sums[head][part] *= before;
    }

    template <typename T> void add(const T *values, int count) {
        for (int i = 0; i < count; i++, values += HEAD_DIM)
            for (int part = 0; part < PARTS; part++) {
                const Vector numbers = load(values + part * LANES);
                for (int head = 0; head < HEADS; head++) sums[head][part] += weights[head][i] * numbers;
            }
    }
};

template <int HEADS, typename T>
void attend(const T *queries, const T *keys, const T *values, int64_t count, float scale, T *out) {
    const Queries<HEADS, T> read(queries);
    Group<HEADS> group;
    for (int head = 0; head < HEADS; head++) group.most[head] = NOTHING;
    for (int64_t start = 0; start < count; start += BLOCK) {
        const int size = (int)std::min<int64_t>(BLOCK, count - start);
        group.score(read, keys + start * HEAD_DIM, size, scale);
        for (int head = 0; head < HEADS; head++) group.weigh(head, size, start == 0);
        group.add(values + start * HEAD_DIM, size);
    }
    for (int head = 0; head < HEADS; head++)
        for (int part = 0; part < PARTS; part++)
            store(out + head * HEAD_DIM + part * LANES, group.sums[head][part] / group.total[head]);
}

template <typename T>
void attend_with(int heads, const T *q, const T *keys, const T *values, int64_t count, float scale, T *out) {
    for (; heads >= 4; heads -= 4, q += 4 * HEAD_DIM, out += 4 * HEAD_DIM)
        attend<4>(q, keys, values, count, scale, out);
    if (heads == 3) attend<3>(q, keys, values, count, scale, out);
    if (heads == 2) attend<2>(q, keys, values, count, scale, out);
    if (heads == 1) attend<1>(q, keys, values, count, scale, out);
}

template <typename T> struct Tokens {
    const T *q, *k, *v;            // of the new tokens, row by row
    T *keys, *values, *out;        // the cache, [heads, tokens of it, HEAD_DIM], and the result, rows as in q
    int64_t q_stride, k_stride, v_stride, out_stride, head_stride;
    const int64_t *rows;           // of each text: its token's row,
    const int64_t *firsts, *counts; // where its part of the cache begins, and how many tokens that holds with the new one
    int64_t texts, heads, per_head, window; // window: tokens that are seen, 0 for all
    float scale;
};

template <typename T> void attend_tokens(const Tokens<T> &given) {
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int64_t text = 0; text < given.texts; text++)
        for (int64_t head = 0; head < given.heads; head++) {
            const int64_t row = given.rows[text], count = given.counts[text];
            const int64_t from = head * given.head_stride + given.firsts[text] * HEAD_DIM;
            T *keys = given.keys + from, *values = given.values + from;
            const int64_t last = (count - 1) * HEAD_DIM;
            std::memcpy(keys + last, given.k + row * given.k_stride + head * HEAD_DIM, HEAD_DIM * sizeof(T));
            std::memcpy(values + last, given.v + row * given.v_stride + head * HEAD_DIM, HEAD_DIM * sizeof(T));
            const int64_t unseen = given.window ? std::max<int64_t>(count - given.window, 0) : 0;
            const int64_t first_query = head * given.per_head * HEAD_DIM;
            attend_with((int)given.per_head, given.q + row * given.q_stride + first_query,
                        keys + unseen * HEAD_DIM, values + unseen * HEAD_DIM, count - unseen, given.scale,
                        given.out + row * given.out_stride + first_query);
        }
}

} // namespace

extern "C" {
void attend_tokens_float32(const Tokens<float> *given) { attend_tokens(*given); }
void attend_tokens_bfloat16(const Tokens<bf16> *given) { attend_tokens(*given); }
}
