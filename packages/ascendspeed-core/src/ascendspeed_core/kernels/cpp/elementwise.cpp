// RMSNorm, rotary embedding and SwiGLU, forward and backward, each in one pass over memory.
//
// In bf16 every result is rounded where torch rounds it operator by operator: `rounded` works on bits, so that no
// compiler joins a product and a sum over it. What is computed of a row depends neither on other rows nor on threads.

#include "vectors.h"

#include <vector>

namespace {

// Numbers below which waking threads takes longer than they save.
constexpr int64_t FEW = 1 << 16;
// Sums over rows that are made one beside the other, and then added up in order.
constexpr int64_t PARTS = 64;

template <typename Work> void for_each(int64_t count, int64_t numbers, const Work &work) {
    if (numbers < FEW) {
        for (int64_t i = 0; i < count; i++) work(i);
        return;
    }
#pragma omp parallel for
    for (int64_t i = 0; i < count; i++) work(i);
}

// A whole vector of numbers, or the last ones of a row.
struct Whole {};
struct Rest {
    int64_t count;
};

template <typename T> Vector get(const T *from, Whole) { return load(from); }

template <typename T> Vector get(const T *from, Rest rest) {
    T values[LANES] = {};
    std::memcpy(values, from, rest.count * sizeof(T));
    return load(values);
}

template <typename Work> void by_vectors(int64_t size, const Work &work) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) work(i, Whole{});
    if (i < size) work(i, Rest{size - i});
}

// The bits of the nearest bf16, ties to even, then 16 others. What is computed of bf16 and is no number has nothing in
// the lower bits, so that it stays none.
inline Bits bits_of(Vector values) {
    const Bits bits = (Bits)values;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

// To the format and back.
template <typename T> Vector rounded(Vector values);
template <> inline Vector rounded<float>(Vector values) { return values; }
template <> inline Vector rounded<bf16>(Vector values) { return (Vector)(bits_of(values) & 0xffff0000); }

inline void put(float *to, Vector values, Whole) { store(to, values); }

inline void put(bf16 *to, Vector values, Whole) {
    const Halves halves = __builtin_convertvector(bits_of(values) >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

template <typename T> void put(T *to, Vector values, Rest rest) {
    T all[LANES];
    put(all, values, Whole{});
    std::memcpy(to, all, rest.count * sizeof(T));
}

// Rows by two strides, as views of heads in a joined product need it.
template <typename T> struct Rows {
    T *data;
    int64_t inner, outer_stride, inner_stride;

    T *operator[](int64_t row) const { return data + row / inner * outer_stride + row % inner * inner_stride; }
};

template <typename T> float sum_of_squares(const T *x, int64_t size) {
    Vector sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= size; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
            const Vector values = load(x + i + k * LANES);
            sums[k] += values * values;
        }
    by_vectors(size - i, [&](int64_t j, auto part) {
        const Vector values = get(x + i + j, part);
        sums[0] += values * values;
    });
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// `factors` gets what each row was multiplied with, unless it is null.
template <typename T>
void rms_norm(Rows<const T> x, const T *weight, T *out, float *factors, int64_t rows, int64_t size, float epsilon) {
    for_each(rows, rows * size, [&](int64_t row) {
        const T *from = x[row];
        T *to = out + row * size;
        const float factor = 1.0f / std::sqrt(sum_of_squares(from, size) / (float)size + epsilon);
        if (factors) factors[row] = factor;
        by_vectors(size, [&](int64_t i, auto part) {
            put(to + i, get(weight + i, part) * rounded<T>(get(from + i, part) * factor), part);
        });
    });
}

// With n = x factor and d = of_out weight: of_x = factor (d - n mean(d n)), of_weight = the sum over rows of of_out n.
template <typename T>
void rms_norm_backward(Rows<const T> x, const T *weight, Rows<const T> of_out, const float *factors, T *of_x,
                       T *of_weight, int64_t rows, int64_t size) {
    const int64_t parts = std::min(rows, PARTS);
    std::vector<float> sums(of_weight ? parts * size : 0);
    for_each(parts, rows * size, [&](int64_t number) {
        float *sum = sums.data() + number * size;
        for (int64_t row = rows * number / parts; row < rows * (number + 1) / parts; row++) {
            const T *from = x[row], *given = of_out[row];
            const float factor = factors[row];
            Vector products = {};
            by_vectors(size, [&](int64_t i, auto part) {
                const Vector normed = get(from + i, part) * factor, of = get(given + i, part);
                products += rounded<T>(of * get(weight + i, part)) * normed;
                if (of_weight) put(sum + i, get(sum + i, part) + of * rounded<T>(normed), part);
            });
            const float mean = sum_of(products) / (float)size;
            T *to = of_x + row * size;
            by_vectors(size, [&](int64_t i, auto part) {
                const Vector of_normed = rounded<T>(get(given + i, part) * get(weight + i, part));
                put(to + i, factor * (of_normed - get(from + i, part) * factor * mean), part);
            });
        }
    });
    if (!of_weight) return;
    for_each((size + LANES - 1) / LANES, parts * size, [&](int64_t number) {
        const int64_t first = number * LANES;
        by_vectors(std::min<int64_t>(size - first, LANES), [&](int64_t, auto part) {
            Vector sum = {};
            for (int64_t k = 0; k < parts; k++) sum += get(sums.data() + k * size + first, part);
            put(of_weight + first, sum, part);
        });
    });
}

// Heads of tokens: [batch, tokens, heads, size] by strides; those of `out` lie side by side.
template <typename T> struct Heads {
    const T *data;
    T *out;
    int64_t heads, batch_stride, token_stride, head_stride;
};

// Turns pairs (i, i + size / 2) of all heads by the angles of their tokens, backwards for gradients.
template <typename T, bool BACK>
void rotate(Heads<T> q, Heads<T> k, const T *cosine, const T *sine, int64_t angle_batch, int64_t angle_token,
            int64_t batches, int64_t tokens, int64_t size) {
    const int64_t half = size / 2;
    for_each(batches * tokens, batches * tokens * (q.heads + k.heads) * size, [&](int64_t number) {
        const int64_t b = number / tokens, t = number % tokens;
        const T *cosines = cosine + b * angle_batch + t * angle_token, *sines = sine + (cosines - cosine);
        by_vectors(half, [&](int64_t i, auto part) {
            const Vector cos_first = get(cosines + i, part), cos_second = get(cosines + half + i, part);
            const Vector against = -get(sines + i, part), along = get(sines + half + i, part);
            const Vector to_first = BACK ? along : against, to_second = BACK ? against : along;
            for (const Heads<T> &x : {q, k}) {
                const T *from = x.data + b * x.batch_stride + t * x.token_stride + i;
                T *to = x.out + number * x.heads * size + i;
                for (int64_t h = 0; h < x.heads; h++, from += x.head_stride, to += size) {
                    const Vector first = get(from, part), second = get(from + half, part);
                    put(to, rounded<T>(first * cos_first) + rounded<T>(second * to_first), part);
                    put(to + half, rounded<T>(second * cos_second) + rounded<T>(first * to_second), part);
                }
            }
        });
    });
}

// 1 + e to the power of -x, infinite where that is in fp32; of what is no number, any. As `exponential` of vectors.h, but
// for its bounds: 2^n comes into the exponent of e^r, which is about 1, by an addition of bits.
inline Vector one_and_exponential(Vector x) {
    constexpr float LOWEST = -88.7228f, ROUNDING = 3 << 22;
    const Vector bounded = x > 87.0f ? Vector{} + 87.0f : (x < LOWEST ? Vector{} + LOWEST : x);
    // n is in the lowest bits.
    const Vector shifted = bounded * -1.44269504088896341f + ROUNDING;
    const Vector n = shifted - ROUNDING;
    const Vector r = -bounded - n * 0.693359375f + n * 2.12194440e-4f;
    const Vector power = (Vector)((Bits)small_exponential(r) + ((Bits)shifted << 23));
    return 1.0f + (x < LOWEST ? Vector{} + INFINITY : power);
}

template <typename T>
void gated(const T *gate, int64_t gate_stride, const T *up, int64_t up_stride, T *out, int64_t rows, int64_t size) {
    for_each(rows, rows * size, [&](int64_t row) {
        const T *g = gate + row * gate_stride, *u = up + row * up_stride;
        T *to = out + row * size;
        by_vectors(size, [&](int64_t i, auto part) {
            const Vector x = get(g + i, part);
            put(to + i, rounded<T>(x / one_and_exponential(x)) * get(u + i, part), part);
        });
    });
}

// Gradients of both have the same stride: they lie apart, or side by side.
template <typename T>
void gated_backward(const T *gate, int64_t gate_stride, const T *up, int64_t up_stride, const T *of_out,
                    int64_t of_out_stride, T *of_gate, T *of_up, int64_t of_stride, int64_t rows, int64_t size) {
    for_each(rows, rows * size, [&](int64_t row) {
        const T *g = gate + row * gate_stride, *u = up + row * up_stride, *given = of_out + row * of_out_stride;
        T *to_gate = of_gate + row * of_stride, *to_up = of_up + row * of_stride;
        by_vectors(size, [&](int64_t i, auto part) {
            const Vector x = get(g + i, part), of = get(given + i, part), whole = one_and_exponential(x);
            const Vector sigmoid = 1.0f / whole;
            put(to_up + i, of * rounded<T>(x / whole), part);
            put(to_gate + i, rounded<T>(of * get(u + i, part)) * sigmoid * (1.0f + x * (1.0f - sigmoid)), part);
        });
    });
}

} // namespace

#define FUNCTIONS(T, NAME)                                                                                             \
    void rms_norm_##NAME(const T *x, int64_t inner, int64_t outer_stride, int64_t inner_stride, const T *weight,       \
                         T *out, float *factors, int64_t rows, int64_t size, float epsilon) {                          \
        rms_norm<T>({x, inner, outer_stride, inner_stride}, weight, out, factors, rows, size, epsilon);                \
    }                                                                                                                  \
    void rms_norm_backward_##NAME(const T *x, int64_t inner, int64_t outer_stride, int64_t inner_stride,               \
                                  const T *weight, const T *of_out, int64_t of_inner, int64_t of_outer_stride,         \
                                  int64_t of_inner_stride, const float *factors, T *of_x, T *of_weight, int64_t rows,  \
                                  int64_t size) {                                                                      \
        rms_norm_backward<T>({x, inner, outer_stride, inner_stride}, weight,                                           \
                             {of_out, of_inner, of_outer_stride, of_inner_stride}, factors, of_x, of_weight, rows,     \
                             size);                                                                                    \
    }                                                                                                                  \
    void rotate_##NAME(const T *q, T *q_out, int64_t q_heads, int64_t q_batch, int64_t q_token, int64_t q_head,        \
                       const T *k, T *k_out, int64_t k_heads, int64_t k_batch, int64_t k_token, int64_t k_head,        \
                       const T *cosine, const T *sine, int64_t angle_batch, int64_t angle_token, int64_t batches,      \
                       int64_t tokens, int64_t size, int32_t is_back) {                                                \
        const auto run = is_back ? rotate<T, true> : rotate<T, false>;                                                 \
        run({q, q_out, q_heads, q_batch, q_token, q_head}, {k, k_out, k_heads, k_batch, k_token, k_head}, cosine,      \
            sine, angle_batch, angle_token, batches, tokens, size);                                                    \
    }                                                                                                                  \
    void gated_##NAME(const T *gate, int64_t gate_stride, const T *up, int64_t up_stride, T *out, int64_t rows,        \
                      int64_t size) {                                                                                  \
        gated<T>(gate, gate_stride, up, up_stride, out, rows, size);                                                   \
    }                                                                                                                  \
    void gated_backward_##NAME(const T *gate, int64_t gate_stride, const T *up, int64_t up_stride, const T *of_out,    \
                               int64_t of_out_stride, T *of_gate, T *of_up, int64_t of_stride, int64_t rows,           \
                               int64_t size) {                                                                         \
        gated_backward<T>(gate, gate_stride, up, up_stride, of_out, of_out_stride, of_gate, of_up, of_stride, rows,    \
                          size);                                                                                       \
    }

extern "C" {
FUNCTIONS(float, float32)
FUNCTIONS(bf16, bfloat16)
}
