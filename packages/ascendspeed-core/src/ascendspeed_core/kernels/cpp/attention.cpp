// Causal attention of whole texts, forward and backward, without all scores in memory (Dao, 2023, FlashAttention-2).
//
// HEAD_DIM is the size of a head, a multiple of 16. Products and sums are in fp32 whatever the format is.

#include <omp.h>

#include <limits>
#include <memory>
#include <vector>

#include "vectors.h"

namespace {

constexpr int QUERIES = 48, KEYS = 64; // of a block
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// C (+)= A B for HIGH rows and WIDE vectors of columns: A(row, i) = a[row * a_row + i * a_step], of B and C rows lie side
// by side.
template <int HIGH, int WIDE>
void multiply_tile(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, int depth, float *c,
                   int64_t c_row, bool add) {
    Vector sums[HIGH][WIDE];
    for (int row = 0; row < HIGH; row++)
        for (int part = 0; part < WIDE; part++) sums[row][part] = add ? load(c + row * c_row + part * LANES) : Vector{};
    for (int i = 0; i < depth; i++) {
        Vector numbers[WIDE];
        for (int part = 0; part < WIDE; part++) numbers[part] = load(b + i * b_row + part * LANES);
        for (int row = 0; row < HIGH; row++) {
            const float factor = a[row * a_row + i * a_step];
            for (int part = 0; part < WIDE; part++) sums[row][part] += factor * numbers[part];
        }
    }
    for (int row = 0; row < HIGH; row++)
        for (int part = 0; part < WIDE; part++) store(c + row * c_row + part * LANES, sums[row][part]);
}

template <int WIDE>
void multiply_columns(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, int high, int depth,
                      float *c, int64_t c_row, bool add) {
    int row = 0;
    for (; row + 6 <= high; row += 6)
        multiply_tile<6, WIDE>(a + row * a_row, a_row, a_step, b, b_row, depth, c + row * c_row, c_row, add);
    for (; row + 2 <= high; row += 2)
        multiply_tile<2, WIDE>(a + row * a_row, a_row, a_step, b, b_row, depth, c + row * c_row, c_row, add);
    for (; row < high; row++)
        multiply_tile<1, WIDE>(a + row * a_row, a_row, a_step, b, b_row, depth, c + row * c_row, c_row, add);
}

// The same for any number of rows, and columns in whole vectors.
void multiply(const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row, int high, int wide,
              int depth, float *c, int64_t c_row, bool add) {
    int column = 0;
    for (; column + 4 * LANES <= wide; column += 4 * LANES)
        multiply_columns<4>(a, a_row, a_step, b + column, b_row, high, depth, c + column, c_row, add);
    for (; column + 2 * LANES <= wide; column += 2 * LANES)
        multiply_columns<2>(a, a_row, a_step, b + column, b_row, high, depth, c + column, c_row, add);
    for (; column < wide; column += LANES)
        multiply_columns<1>(a, a_row, a_step, b + column, b_row, high, depth, c + column, c_row, add);
}

template <typename T> void widen(const T *from, int64_t stride, int rows, float factor, float *to) {
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < HEAD_DIM; i += LANES)
            store(to + row * HEAD_DIM + i, load(from + row * stride + i) * factor);
}

// Rows to columns: [rows, HEAD_DIM] -> [HEAD_DIM, KEYS], the columns behind the last 0.
template <typename T> void turn(const T *from, int64_t stride, int rows, float *to) {
    alignas(64) float row[HEAD_DIM] = {};
    for (int column = 0; column < KEYS; column++) {
        for (int i = 0; i < HEAD_DIM; i += LANES)
            store(row + i, column < rows ? load(from + column * stride + i) : Vector{});
        for (int i = 0; i < HEAD_DIM; i++) to[i * KEYS + column] = row[i];
    }
}

template <typename T> struct Heads { // [batch, heads, tokens, HEAD_DIM]
    T *data;
    int64_t batch, head, row;
    T *at(int64_t b, int64_t h, int64_t token) const { return data + b * batch + h * head + token * row; }
};

struct Span {
    int64_t first, end;
};

template <typename T> struct Attention {
    Heads<T> q, k, v, out, of_out, of_q, of_k, of_v; // the last four are gradients
    float *log_sums;                                 // of the softmax, [batch, heads, queries]
    int64_t batches, heads, per_head, queries, keys, window; // window: keys that a query sees, 0 for all
    float scale;

    // Keys that a query sees: the last query the last one and those before it.
    Span seen(int64_t query) const {
        const int64_t end = query + 1 + keys - queries;
        return {window ? std::max<int64_t>(end - window, 0) : 0, end};
    }
    Span seen_by_any(int64_t first, int rows) const {
        return {seen(first).first / KEYS * KEYS, seen(first + rows - 1).end};
    }
    float *log_sums_of(int64_t b, int64_t h) const { return log_sums + (b * heads + h) * queries; }
};

// Which keys of a block a query sees, as columns of the block.
struct Columns {
    int first, end;
};

template <typename T> Columns columns(const Attention<T> &x, int64_t query, int64_t start, int count) {
    const Span span = x.seen(query);
    const int end = (int)std::min<int64_t>(count, span.end - start);
    return {(int)std::max<int64_t>(span.first - start, 0), std::max(end, 0)};
}

// Turns a row of scores into weights against the largest score so far, and what was added up before likewise.
void weigh(float *scores, Columns seen, int size, float &most, float &total, float *sums) {
    for (int i = 0; i < seen.first; i++) scores[i] = NOTHING;
    for (int i = seen.end; i < size; i++) scores[i] = NOTHING;
    Vector tops = load(scores);
    for (int i = LANES; i < size; i += LANES) {
        const Vector more = load(scores + i);
        tops = more > tops ? more : tops;
    }
    const float top = std::max(most, most_of(tops));
    Vector sum = {};
    for (int i = 0; i < size; i += LANES) {
        const Vector own = load(scores + i), powers = exponential(own - top);
        const Vector weights = own == NOTHING ? Vector{} : powers;
        store(scores + i, weights);
        sum += weights;
    }
    if (top != most) {
        const float before = most == NOTHING ? 0 : std::exp(most - top);
        for (int i = 0; i < HEAD_DIM; i += LANES) store(sums + i, load(sums + i) * before);
        total *= before;
        most = top;
    }
    total += sum_of(sum);
}

template <typename T>
void forward_block(const Attention<T> &x, int64_t b, int64_t h, int64_t first, const float *turned, const float *wide) {
    alignas(64) float q[QUERIES * HEAD_DIM], weights[QUERIES * KEYS], sums[QUERIES * HEAD_DIM] = {};
    float most[QUERIES], total[QUERIES] = {};
    const int rows = (int)std::min<int64_t>(QUERIES, x.queries - first);
    widen(x.q.at(b, h, first), x.q.row, rows, x.scale, q);
    std::fill(most, most + QUERIES, NOTHING);
    const Span span = x.seen_by_any(first, rows);
    for (int64_t start = span.first; start < span.end; start += KEYS) {
        const int count = (int)std::min<int64_t>(KEYS, span.end - start), size = (int)whole(count, LANES);
        multiply(q, HEAD_DIM, 1, turned + start * HEAD_DIM, KEYS, rows, size, HEAD_DIM, weights, KEYS, false);
        for (int row = 0; row < rows; row++) {
            const Columns seen = columns(x, first + row, start, count);
            if (seen.first < seen.end)
                weigh(weights + row * KEYS, seen, size, most[row], total[row], sums + row * HEAD_DIM);
            else
                std::fill(weights + row * KEYS, weights + row * KEYS + size, 0.f);
        }
        multiply(weights, KEYS, 1, wide + start * HEAD_DIM, HEAD_DIM, rows, HEAD_DIM, count, sums, HEAD_DIM, true);
    }
    for (int row = 0; row < rows; row++) {
        for (int i = 0; i < HEAD_DIM; i += LANES)
            store(x.out.at(b, h, first + row) + i, load(sums + row * HEAD_DIM + i) / total[row]);
        x.log_sums_of(b, h)[first + row] = most[row] + std::log(total[row]);
    }
}

template <typename T> void forward(const Attention<T> &x) {
    const int64_t groups = x.heads / x.per_head, blocks = whole(x.queries, QUERIES) / QUERIES;
    const int64_t size = whole(x.keys, KEYS) * HEAD_DIM;
    // Keys by columns and values in fp32, once for all queries.
    std::unique_ptr<float[]> turned(new float[x.batches * groups * size]), wide(new float[x.batches * groups * size]);
#pragma omp parallel
    {
#pragma omp for collapse(3)
        for (int64_t b = 0; b < x.batches; b++)
            for (int64_t g = 0; g < groups; g++)
                for (int64_t start = 0; start < x.keys; start += KEYS) {
                    const int count = (int)std::min<int64_t>(KEYS, x.keys - start);
                    const int64_t to = (b * groups + g) * size + start * HEAD_DIM;
                    turn(x.k.at(b, g, start), x.k.row, count, turned.get() + to);
                    widen(x.v.at(b, g, start), x.v.row, count, 1, wide.get() + to);
                }
        // The last queries, which see most, come first.
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t b = 0; b < x.batches; b++)
            for (int64_t block = blocks; block > 0; block--)
                for (int64_t h = 0; h < x.heads; h++) {
                    const int64_t from = (b * groups + h / x.per_head) * size;
                    forward_block(x, b, h, (block - 1) * QUERIES, turned.get() + from, wide.get() + from);
                }
    }
}

// Keys and values of one key head, as the products of a backward read them.
struct Prepared {
    std::unique_ptr<float[]> room;
    float *turned_k, *turned_v, *wide_k;

    template <typename T> Prepared(const Attention<T> &x, int64_t b, int64_t g) {
        const int64_t size = whole(x.keys, KEYS) * HEAD_DIM;
        room.reset(new float[3 * size]);
        turned_k = room.get(), turned_v = turned_k + size, wide_k = turned_v + size;
        for (int64_t start = 0; start < x.keys; start += KEYS) {
            const int count = (int)std::min<int64_t>(KEYS, x.keys - start);
            turn(x.k.at(b, g, start), x.k.row, count, turned_k + start * HEAD_DIM);
            turn(x.v.at(b, g, start), x.v.row, count, turned_v + start * HEAD_DIM);
            widen(x.k.at(b, g, start), x.k.row, count, 1, wide_k + start * HEAD_DIM);
        }
    }
};

// Gradients of one block of queries, and what it adds to those of all keys and values, [keys, HEAD_DIM] in fp32.
template <typename T>
void backward_block(const Attention<T> &x, int64_t b, int64_t h, int64_t first, const Prepared &given, float *of_k,
                    float *of_v) {
    alignas(64) float q[QUERIES * HEAD_DIM], of_out[QUERIES * HEAD_DIM], of_q[QUERIES * HEAD_DIM] = {};
    alignas(64) float weights[QUERIES * KEYS], of_scores[QUERIES * KEYS];
    float inner[QUERIES]; // sum over a row of weight times its gradient (appendix B.2)
    const int rows = (int)std::min<int64_t>(QUERIES, x.queries - first);
    const float *log_sums = x.log_sums_of(b, h) + first;
    widen(x.q.at(b, h, first), x.q.row, rows, x.scale, q);
    widen(x.of_out.at(b, h, first), x.of_out.row, rows, 1, of_out);
    for (int row = 0; row < rows; row++) {
        Vector sum = {};
        for (int i = 0; i < HEAD_DIM; i += LANES)
            sum += load(of_out + row * HEAD_DIM + i) * load(x.out.at(b, h, first + row) + i);
        inner[row] = sum_of(sum);
    }
    const Span span = x.seen_by_any(first, rows);
    for (int64_t start = span.first; start < span.end; start += KEYS) {
        const int count = (int)std::min<int64_t>(KEYS, span.end - start), size = (int)whole(count, LANES);
        const int64_t from = start * HEAD_DIM;
        multiply(q, HEAD_DIM, 1, given.turned_k + from, KEYS, rows, size, HEAD_DIM, weights, KEYS, false);
        multiply(of_out, HEAD_DIM, 1, given.turned_v + from, KEYS, rows, size, HEAD_DIM, of_scores, KEYS, false);
        for (int row = 0; row < rows; row++) {
            float *own = weights + row * KEYS, *of_own = of_scores + row * KEYS;
            for (int i = 0; i < size; i += LANES) {
                const Vector weight = exponential(load(own + i) - log_sums[row]);
                store(own + i, weight);
                store(of_own + i, weight * (load(of_own + i) - inner[row]));
            }
            const Columns seen = columns(x, first + row, start, count);
            for (int i = 0; i < size; i++)
                if (i < seen.first || i >= seen.end) own[i] = of_own[i] = 0;
        }
        multiply(of_scores, KEYS, 1, given.wide_k + from, HEAD_DIM, rows, HEAD_DIM, count, of_q, HEAD_DIM, true);
        multiply(weights, 1, KEYS, of_out, HEAD_DIM, count, HEAD_DIM, rows, of_v + from, HEAD_DIM, true);
        multiply(of_scores, 1, KEYS, q, HEAD_DIM, count, HEAD_DIM, rows, of_k + from, HEAD_DIM, true);
    }
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < HEAD_DIM; i += LANES)
            store(x.of_q.at(b, h, first + row) + i, load(of_q + row * HEAD_DIM + i) * x.scale);
}

template <typename T> void backward(const Attention<T> &x) {
    const int64_t groups = x.heads / x.per_head, size = x.keys * HEAD_DIM;
    // Query heads that share their keys are added up one after the other, if there is work for all threads all the same.
    const int64_t per_unit = x.batches * groups >= omp_get_max_threads() ? x.per_head : 1;
    const int64_t units = x.heads / per_unit, units_of_group = x.per_head / per_unit;
    std::vector<float> sums(2 * x.batches * units * size);
#pragma omp parallel
    {
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < x.batches; b++)
            for (int64_t unit = 0; unit < units; unit++) {
                float *of_k = sums.data() + 2 * (b * units + unit) * size, *of_v = of_k + size;
                const Prepared given(x, b, unit / units_of_group);
                for (int64_t h = unit * per_unit; h < (unit + 1) * per_unit; h++)
                    for (int64_t first = 0; first < x.queries; first += QUERIES)
                        backward_block(x, b, h, first, given, of_k, of_v);
            }
#pragma omp for collapse(3)
        for (int64_t b = 0; b < x.batches; b++)
            for (int64_t g = 0; g < groups; g++)
                for (int64_t key = 0; key < x.keys; key++)
                    for (int i = 0; i < HEAD_DIM; i += LANES) {
                        Vector of_k = {}, of_v = {};
                        for (int64_t unit = g * units_of_group; unit < (g + 1) * units_of_group; unit++) {
                            const float *own = sums.data() + 2 * (b * units + unit) * size + key * HEAD_DIM + i;
                            of_k += load(own);
                            of_v += load(own + size);
                        }
                        store(x.of_k.at(b, g, key) + i, of_k);
                        store(x.of_v.at(b, g, key) + i, of_v);
                    }
    }
}

} // namespace

extern "C" {
void forward_float32(const Attention<float> *given) { forward(*given); }
void forward_bfloat16(const Attention<bf16> *given) { forward(*given); }
void backward_float32(const Attention<float> *given) { backward(*given); }
void backward_bfloat16(const Attention<bf16> *given) { backward(*given); }
}
