// Vectors of 16 numbers in fp32, read from and written to fp32 or bf16; the compiler takes what registers there are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

constexpr int LANES = 16;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bf16 {
    uint16_t bits;
};

inline Vector load(const float *from) {
    Vector values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline Vector load(const bf16 *from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Vector)(__builtin_convertvector(halves, Bits) << 16);
}

inline Halves halves_of(Vector values) {
    // To the nearest, ties to even; what is no number stays none.
    const Bits bits = (Bits)values;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(values == values ? rounded : Bits{} + 0x7fc0, Halves);
}

inline void store(float *to, Vector values) { std::memcpy(to, &values, sizeof values); }

inline void store(bf16 *to, Vector values) {
    const Halves halves = halves_of(values);
    std::memcpy(to, &halves, sizeof halves);
}

// e to the power of r, of at most log(2) / 2 in size, by a polynomial (Cephes).
inline Vector small_exponential(Vector r) {
    Vector p = Vector{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}

// e to the power of x, within 2 units of the last place: 2^n e^r with |r| <= log(2) / 2.
inline Vector exponential(Vector x) {
    const Vector bounded = x < -87.0f ? Vector{} - 87.0f : (x > 88.0f ? Vector{} + 88.0f : x);
    // Shifted to where numbers are positive, so that cutting off is rounding down.
    const Integers n = __builtin_convertvector(bounded * 1.44269504088896341f + 128.5f, Integers) - 128;
    const Vector whole = __builtin_convertvector(n, Vector);
    const Vector r = bounded - whole * 0.693359375f + whole * 2.12194440e-4f;
    const Vector power = small_exponential(r) * (Vector)((n + 127) << 23);
    return x == x ? power : x;
}

inline float sum_of(Vector values) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
}

inline float most_of(Vector values) {
    float most = values[0];
    for (int lane = 1; lane < LANES; lane++) most = std::max(most, values[lane]);
    return most;
}
