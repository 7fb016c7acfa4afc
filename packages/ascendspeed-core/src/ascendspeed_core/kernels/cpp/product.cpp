// Products of rows with a weight that lies in panels: the numbers of WIDTH outputs side by side, input after input.
//
// A panel is read once for up to ROWS rows at a time, whose sums stay in registers. The order of a sum does not depend
// on how many rows there are.

#include <omp.h>

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int VECTORS = 2, ROWS = 8;
#else
constexpr int VECTORS = 1, ROWS = 6;
#endif
constexpr int WIDTH = VECTORS * LANES;
constexpr int64_t CHUNK = 512;            // rows that meet a panel before the next one: they stay in the cache
constexpr int64_t LEAST_CHUNK = 64;       // where more threads than panels want work
constexpr int64_t FEW_PRODUCTS = 1 << 16; // below which threads cost more than they bring

struct Product {
    const void *x, *panels, *bias;
    void *out;
    int64_t rows, inputs, outputs, stride; // of a row of x, in numbers
};

// Products of LANES outputs with DEPTH inputs, added to their sums.
inline Vector added(Vector sum, const float *weights, const float *x) { return sum + load(weights) * *x; }
constexpr int depth(const float *) { return 1; }

#ifdef __AVX512BF16__
inline Vector added(Vector sum, const bf16 *weights, const bf16 *x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weights),
                                    (__m512bh)_mm512_set1_epi32(pair));
}
constexpr int depth(const bf16 *) { return 2; }
#endif

template <typename T, int COUNT>
void multiply_rows(const Product &given, const T *panel, int64_t row, int64_t first) {
    constexpr int DEPTH = depth((const T *)nullptr);
    const T *x = (const T *)given.x + row * given.stride;
    Vector sums[COUNT][VECTORS] = {};
    for (int64_t i = 0; i < given.inputs; i += DEPTH, panel += WIDTH * DEPTH)
        for (int r = 0; r < COUNT; r++)
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = added(sums[r][v], panel + v * LANES * DEPTH, x + r * given.stride + i);
    const int64_t wanted = std::min<int64_t>(WIDTH, given.outputs - first);
    for (int r = 0; r < COUNT; r++) {
        T *out = (T *)given.out + (row + r) * given.outputs + first;
        const T *bias = given.bias ? (const T *)given.bias + first : nullptr;
        if (wanted == WIDTH) {
            for (int v = 0; v < VECTORS; v++)
                store(out + v * LANES, bias ? sums[r][v] + load(bias + v * LANES) : sums[r][v]);
            continue;
        }
        T whole[WIDTH], added_bias[WIDTH] = {};
        if (bias) std::memcpy(added_bias, bias, wanted * sizeof(T));
        for (int v = 0; v < VECTORS; v++)
            store(whole + v * LANES, bias ? sums[r][v] + load(added_bias + v * LANES) : sums[r][v]);
        std::memcpy(out, whole, wanted * sizeof(T));
    }
}

template <typename T, int COUNT>
void multiply_few(const Product &given, const T *panel, int64_t row, int64_t count, int64_t first) {
    if constexpr (COUNT > 0) {
        if (count == COUNT)
            multiply_rows<T, COUNT>(given, panel, row, first);
        else
            multiply_few<T, COUNT - 1>(given, panel, row, count, first);
    }
}

template <typename T> void multiply(const Product &given) {
    const int64_t panels = (given.outputs + WIDTH - 1) / WIDTH, threads = omp_get_max_threads();
    int64_t chunk = CHUNK;
    while (chunk > LEAST_CHUNK && panels * ((given.rows + chunk - 1) / chunk) < 4 * threads) chunk /= 2;
    const int64_t chunks = (given.rows + chunk - 1) / chunk, at_once = std::max<int64_t>(panels / (8 * threads), 1);
    const bool is_large = given.rows * given.inputs * given.outputs > FEW_PRODUCTS;
#pragma omp parallel for collapse(2) schedule(dynamic, at_once) if (is_large)
    for (int64_t c = 0; c < chunks; c++)
        for (int64_t p = 0; p < panels; p++) {
            const T *panel = (const T *)given.panels + p * WIDTH * given.inputs;
            const int64_t begin = c * chunk, left = std::min(chunk, given.rows - begin);
            // Groups of nearly the same size: a small last one would read the panel for little.
            const int64_t groups = (left + ROWS - 1) / ROWS;
            for (int64_t g = 0; g < groups; g++) {
                const int64_t from = left * g / groups, to = left * (g + 1) / groups;
                multiply_few<T, ROWS>(given, panel, begin + from, to - from, p * WIDTH);
            }
        }
}

// Where a number of the weight lies in its panels.
template <typename T> inline int64_t position(int64_t output, int64_t input, int64_t inputs) {
    constexpr int DEPTH = depth((const T *)nullptr);
    return output / WIDTH * WIDTH * inputs + input / DEPTH * WIDTH * DEPTH + output % WIDTH * DEPTH + input % DEPTH;
}

template <typename T> void pack(const T *weight, T *panels, int64_t outputs, int64_t inputs) {
    const int64_t padded = (outputs + WIDTH - 1) / WIDTH * WIDTH;
#pragma omp parallel for
    for (int64_t o = 0; o < padded; o++)
        for (int64_t i = 0; i < inputs; i++)
            panels[position<T>(o, i, inputs)] = o < outputs ? weight[o * inputs + i] : T{};
}

template <typename T> void unpack(const T *panels, T *weight, int64_t outputs, int64_t inputs) {
#pragma omp parallel for
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t i = 0; i < inputs; i++) weight[o * inputs + i] = panels[position<T>(o, i, inputs)];
}

} // namespace

#define FUNCTIONS(NAME, T)                                                                                             \
    void multiply_##NAME(const Product *given) { multiply<T>(*given); }                                                \
    void pack_##NAME(const void *weight, void *panels, int64_t outputs, int64_t inputs) {                              \
        pack((const T *)weight, (T *)panels, outputs, inputs);                                                         \
    }                                                                                                                  \
    void unpack_##NAME(const void *panels, void *weight, int64_t outputs, int64_t inputs) {                            \
        unpack((const T *)panels, (T *)weight, outputs, inputs);                                                       \
    }

extern "C" {

int64_t panel_width() { return WIDTH; }

FUNCTIONS(float32, float)
#ifdef __AVX512BF16__
FUNCTIONS(bfloat16, bf16)
#endif
}
