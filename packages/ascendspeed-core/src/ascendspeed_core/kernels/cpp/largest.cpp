// The largest number of each of some rows, and the first position where it stands. A NaN is larger than all numbers.

#include "vectors.h"

#include <limits>

namespace {

constexpr int64_t BLOCK = 16 * LANES;    // numbers that are read before the largest so far is looked at
constexpr int64_t FEW_NUMBERS = 1 << 16; // for which waking threads takes longer than they save

inline float as_float(float number) { return number; }
inline float as_float(bf16 number) {
    const uint32_t bits = (uint32_t)number.bits << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename T> int64_t first_largest(const T *row, int64_t count) {
    float most = -std::numeric_limits<float>::infinity();
    int64_t position = 0;
    // Looks at numbers one after the other; says whether there is a NaN, which nothing exceeds.
    const auto look_at = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const float number = as_float(row[i]);
            if (number > most || number != number) {
                most = number;
                position = i;
                if (number != number) return true;
            }
        }
        return false;
    };
    int64_t begin = 0;
    for (; begin + BLOCK <= count; begin += BLOCK) {
        Integers is_more = {};
        for (int64_t i = begin; i < begin + BLOCK; i += LANES) is_more |= ~(load(row + i) <= most);
        int32_t any = 0;
        for (int lane = 0; lane < LANES; lane++) any |= is_more[lane];
        if (any && look_at(begin, begin + BLOCK)) return position;
    }
    look_at(begin, count);
    return position;
}

template <typename T>
void largest(const T *const *rows, int64_t num_rows, int64_t count, T *numbers, int64_t *positions) {
#pragma omp parallel for if (num_rows * count > FEW_NUMBERS)
    for (int64_t row = 0; row < num_rows; row++) {
        positions[row] = first_largest(rows[row], count);
        numbers[row] = rows[row][positions[row]];
    }
}

} // namespace

#define FUNCTION(NAME, T)                                                                                              \
    void largest_##NAME(const T *const *rows, int64_t num_rows, int64_t count, T *numbers, int64_t *positions) {       \
        largest(rows, num_rows, count, numbers, positions);                                                            \
    }

extern "C" {
FUNCTION(float32, float)
FUNCTION(bfloat16, bf16)
}
