// The executor's arithmetic on the CPU. Everything that costs time is one tile: a few rows of inputs against 2 vectors
// of 16 outputs, over pairs of elements, all sums in registers. Products with weights, scores (queries with keys) and
// mixtures (weights with values) are laid out so that each is that tile.
//
// A row's result never depends on the other rows: the order of its sums is fixed by its own length alone. So the same
// request gives the same tokens in any batch, bit for bit.
//
// Elements T are float, or bf16 (the upper half of a float); sums are float. Pair layout: elements i and i + 1 of one
// lane lie side by side for bf16 (AVX-512 with BF16 has an instruction that multiplies both), in two vectors for float.
//
// What has `#pragma omp for` or a barrier in it is called by every thread of a team: a pass over the model is one
// parallel region, because waking threads for each of its 200 parts would cost more than the smaller parts.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

constexpr int MOST_ROWS = 13;  // of a tile: 26 of 32 registers accumulate

// ---- the tile

// Where element `i` of `lane` lies, `width` lanes side by side.
template <class T>
inline long place(long i, long lane, long width);
template <>
inline long place<float>(long i, long lane, long width) {
    return i * width + lane;
}
template <>
inline long place<bf16>(long i, long lane, long width) {
    return i / 2 * 2 * width + lane * 2 + i % 2;
}

// sums += the pair of inputs at `x` times the pair of every lane at `at`.
inline void dot(floats& sums, const float* x, const float* at, long width) {
    sums += x[0] * read(at);
    sums += x[1] * read(at + width);
}
inline void dot(floats& sums, const bf16* x, const bf16* at, long) {
#if defined(__AVX512BF16__)
    int32_t pair;
    std::memcpy(&pair, x, 4);
    sums = (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_loadu_si512(at), (__m512bh)_mm512_set1_epi32(pair));
#else
    const words pairs = *reinterpret_cast<const words*>(at);
    sums += read1(x) * (floats)(pairs << 16);
    sums += read1(x + 1) * (floats)(pairs & 0xffff0000u);
#endif
}

// What a tile fetches on the way, because it comes next: `count` times LANES elements from each place, if there is one.
template <class T>
struct Ahead {
    const T *one = nullptr, *two = nullptr;
};

// ROWS rows of x (row_step apart) times two vectors of lanes, over `count` elements (even), added to `sums`.
#if !defined(__AVX512F__)
// Registers are fewer and smaller than a vector of lanes here, and what does not fit in them costs twenty times as much:
// a tile is made in blocks whose sums fit, a vector of lanes in PARTS.
#if defined(__AVX__)
constexpr int PART = 8, MOST_SUMS = 12;  // of 16 registers
#elif defined(__aarch64__)
constexpr int PART = 4, MOST_SUMS = 24;  // of 32
#else
constexpr int PART = 4, MOST_SUMS = 12;
#endif
constexpr int PARTS = LANES / PART;
typedef float part __attribute__((vector_size(4 * PART), aligned(4), may_alias));
typedef uint32_t part_words __attribute__((vector_size(4 * PART), aligned(2), may_alias));

template <int E>
inline part widened(part_words pairs) {
    return (part)(E ? pairs & 0xffff0000u : pairs << 16);
}
// Of a pair of elements the first (E = 0) or the second, of part `n` of the lanes.
template <int E>
inline part element(const float* at, long width, int n) {
    return *reinterpret_cast<const part*>(at + E * width + PART * n);
}
template <int E>
inline part element(const bf16* at, long, int n) {
    return widened<E>(*reinterpret_cast<const part_words*>(at + 2 * PART * n));
}
// Element E of a row's pair, in all lanes.
template <int E>
inline part input(const float* x) {
    return x[E] - part{};
}
template <int E>
inline part input(const bf16* x) {
    uint32_t pair;
    std::memcpy(&pair, x, 4);
    part_words pairs = pair + part_words{};
    // Widened only now: a broadcast from memory costs nothing, one from a register does.
#if defined(__x86_64__)
    asm("" : "+x"(pairs));
#elif defined(__aarch64__)
    asm("" : "+w"(pairs));
#endif
    return widened<E>(pairs);
}

// ROWS rows of element E times VECTORS vectors of lanes.
template <int E, class T, int ROWS, int VECTORS>
inline void add(const T* x, long row_step, const T* const (&at)[VECTORS], long width,
                part (&sums)[ROWS][VECTORS][PARTS]) {
    part weights[VECTORS][PARTS];
    for (int v = 0; v < VECTORS; ++v)
        for (int n = 0; n < PARTS; ++n) weights[v][n] = element<E>(at[v], width, n);
    for (int r = 0; r < ROWS; ++r) {
        const part by = input<E>(x + r * row_step);
        for (int v = 0; v < VECTORS; ++v)
            for (int n = 0; n < PARTS; ++n) sums[r][v][n] += by * weights[v][n];
    }
}

template <class T, int ROWS, int VECTORS>
inline void block(const T* x, long row_step, const T* const (&from)[VECTORS], long width, long count, Ahead<T> ahead,
                  floats* const (&to)[VECTORS]) {
    part sums[ROWS][VECTORS][PARTS];
    const auto place = [&](int r, int v, int n) { return reinterpret_cast<part*>(to[v] + 2 * r) + n; };
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
            for (int n = 0; n < PARTS; ++n) sums[r][v][n] = *place(r, v, n);
    for (long i = 0; i < count; i += 2) {
        if (ahead.one) __builtin_prefetch(ahead.one + i * LANES, 0, 2);
        if (ahead.two) __builtin_prefetch(ahead.two + i * LANES, 0, 2);
        const T *rows = x + i, *at[VECTORS];
        for (int v = 0; v < VECTORS; ++v) at[v] = from[v] + i * width;
        add<0>(rows, row_step, at, width, sums);
        asm("" : "+r"(rows));  // so that pairs are read again: kept, they would push sums out of the registers
        for (int v = 0; v < VECTORS; ++v) asm("" : "+r"(at[v]));
        add<1>(rows, row_step, at, width, sums);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v)
            for (int n = 0; n < PARTS; ++n) *place(r, v, n) = sums[r][v][n];
}

template <class T, int ROWS, int LEFT = ROWS>
inline void tile(const T* x, long row_step, const T* left, const T* right, long width, long count, Ahead<T> ahead,
                 floats (&sums)[ROWS][2]) {
    constexpr int MOST = MOST_SUMS / PARTS;  // rows of a block with one vector of lanes
    floats* const to = sums[ROWS - LEFT];
    const T* rows = x + (ROWS - LEFT) * row_step;
    if constexpr (2 * LEFT <= MOST) {
        block<T, LEFT, 2>(rows, row_step, {left, right}, width, count, ahead, {to, to + 1});
    } else {
        constexpr int BLOCKS = (LEFT + MOST - 1) / MOST, HERE = (LEFT + BLOCKS - 1) / BLOCKS;  // of like sizes
        block<T, HERE, 1>(rows, row_step, {left}, width, count, {ahead.one, nullptr}, {to});
        block<T, HERE, 1>(rows, row_step, {right}, width, count, {nullptr, ahead.two}, {to + 1});
        if constexpr (LEFT > HERE) tile<T, ROWS, LEFT - HERE>(x, row_step, left, right, width, count, {}, sums);
    }
}
#else
template <class T, int ROWS>
inline void tile(const T* x, long row_step, const T* left, const T* right, long width, long count, Ahead<T> ahead,
                 floats (&sums)[ROWS][2]) {
    for (long i = 0; i < count; i += 2) {
        const long at = i * width;
        if (ahead.one) __builtin_prefetch(ahead.one + i * LANES, 0, 2);
        if (ahead.two) __builtin_prefetch(ahead.two + i * LANES, 0, 2);
        for (int r = 0; r < ROWS; ++r) {
            dot(sums[r][0], x + r * row_step + i, left + at, width);
            dot(sums[r][1], x + r * row_step + i, right + at, width);
        }
    }
}
#endif

// Calls `body` with the number of rows as a constant.
template <int ROWS, class Body>
inline void with_rows(long rows, const Body& body) {
    if constexpr (ROWS > 0) {
        if (rows == ROWS)
            body(std::integral_constant<int, ROWS>());
        else
            with_rows<ROWS - 1>(rows, body);
    }
}

// ---- products with weights

// Weights [outs, size] packed for the tile: [outs / LANES, size / 2 pairs, LANES], outs filled up with zeros to an even
// number of vectors.
inline long padded(long outs) { return (outs + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

template <class T>
void pack(const T* weight, T* packed, long outs, long size, int threads) {
#pragma omp parallel for num_threads(threads)
    for (long out = 0; out < padded(outs); ++out) {
        T* panel = packed + out / LANES * LANES * size;
        for (long i = 0; i < size; ++i)
            panel[place<T>(i, out % LANES, LANES)] = out < outs ? weight[out * size + i] : T{};
    }
}

// Elements `from` ... of a bias of `outs`, filled up with zeros.
template <class T>
inline floats biased(const T* bias, long from, long outs) {
    if (from + LANES <= outs) return read(bias + from);
    floats found{};
    for (long i = from; i < outs; ++i) found[i - from] = read1(bias + i);
    return found;
}

// GATED: of two panels side by side the left one gates the right one, so that `outs` counts pairs of them:
// out = silu(left) * right, rounded where the reference rounds. Else out = left, right.
template <class T, bool GATED = false>
void linear(const T* x, const T* packed, const T* bias, T* out, long rows, long size, long outs) {
    const long panels = GATED ? outs / LANES * 2 : padded(outs) / LANES;
    constexpr long CHUNK = 20 * MOST_ROWS;  // rows at a time, so that inputs stay in the second-level cache
    const long panel_step = LANES * size;
    for (long start = 0; start < rows; start += CHUNK) {
        const long here = rows - start < CHUNK ? rows - start : CHUNK;
        const long blocks = (here + MOST_ROWS - 1) / MOST_ROWS;  // of like sizes: a short one would waste registers
#pragma omp for nowait
        for (long panel = 0; panel < panels; panel += 2)
            for (long block = 0; block < blocks; ++block) {
                const long first = start + here * block / blocks, count = start + here * (block + 1) / blocks - first;
                const T* left = packed + panel * panel_step;
                // the next panels, while these are worked on for the last time
                Ahead<T> ahead;
                if (block + 1 == blocks) ahead = {left + 2 * panel_step, left + 3 * panel_step};
                with_rows<MOST_ROWS>(count, [&](auto constant) {
                    constexpr int ROWS = decltype(constant)::value;
                    floats sums[ROWS][2] = {};
                    tile<T, ROWS>(x + first * size, size, left, left + panel_step, LANES, size, ahead, sums);
                    for (int r = 0; r < ROWS; ++r) {
                        if (bias)
                            for (int half = 0; half < 2; ++half)
                                sums[r][half] += biased(bias, (panel + half) * LANES, GATED ? panels * LANES : outs);
                        if (GATED) {
                            const floats left = rounded<T>(sums[r][0]), right = rounded<T>(sums[r][1]);
                            const floats turned = rounded<T>(left / (1.0f + exponential(-left)));
                            write(out + (first + r) * outs + panel / 2 * LANES, turned * right);
                            continue;
                        }
                        for (int half = 0; half < 2; ++half) {
                            const long lane = (panel + half) * LANES;
                            T* target = out + (first + r) * outs + lane;
                            if (lane + LANES <= outs) {
                                write(target, sums[r][half]);
                            } else {
                                for (long i = lane; i < outs; ++i) write1(target + i - lane, sums[r][half][i - lane]);
                            }
                        }
                    }
                });
            }
    }
#pragma omp barrier
}

// ---- norms

// x += step; out = x / rms(x) * weight, rounded where the reference rounds. size is a multiple of LANES.
template <class T>
void add_norm(T* x, const T* step, const T* weight, T* out, long rows, long size, float eps) {
#pragma omp for
    for (long row = 0; row < rows; ++row) {
        T* stream = x + row * size;
        floats squares{};
        for (long i = 0; i < size; i += LANES) {
            floats value = read(stream + i);
            if (step) {
                value = rounded<T>(value + read(step + row * size + i));
                write(stream + i, value);
            }
            squares += value * value;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
        for (long i = 0; i < size; i += LANES)
            write(out + row * size + i, rounded<T>(read(stream + i) * scale) * read(weight + i));
    }
}

// ---- attention

struct Shape {
    long heads, kv_heads, size;  // size of a head: a multiple of 2 * LANES
};

// Rotate one head by its position's angles, in place: (a, b) -> (a cos - b sin, b cos + a sin) for halves a, b.
template <class T>
inline void rotate(T* x, const T* cosine, const T* sine, long size) {
    const long half = size / 2;
    for (long i = 0; i < half; i += LANES) {
        const floats a = read(x + i), b = read(x + half + i);
        write(x + i, a * read(cosine + i) - b * read(sine + i));
        write(x + half + i, b * read(cosine + half + i) + a * read(sine + half + i));
    }
}

// The pages of one key head, and of what is worked on next.
template <class T>
struct Cached {
    const T *keys, *values;
    const int32_t* pages;
    long used;  // pages
};

// ROWS query rows (tokens of one sequence, heads of one group; `visible` tokens each) against the pages of one key head.
// Keys of a page: element d of token t at place(d, t, LANES); values: token t of element d at place(t, d, size).
template <class T, int ROWS>
void mix(const T* const* queries, T* const* outs, const long* visible, const Cached<T>& here, const Cached<T>& next,
         long page_step, long size, std::vector<T>& gathered, std::vector<float>& scores, std::vector<T>& weights) {
    const long used = here.used;
    const auto key = [&](long p) { return here.keys + here.pages[p] * page_step; };
    const auto value = [&](long p) { return here.values + here.pages[p] * page_step; };
    const long even = (used + 1) / 2 * 2, span = even * LANES;
    if (long(scores.size()) < ROWS * span) scores.resize(ROWS * span), weights.resize(ROWS * span);
    for (int r = 0; r < ROWS; ++r) std::memcpy(gathered.data() + r * size, queries[r], size * sizeof(T));
    const float scale = 1.0f / std::sqrt(float(size));
    for (long p = 0; p < used; p += 2) {
        const bool both = p + 1 < used;
        floats sums[ROWS][2] = {};
        tile<T, ROWS>(gathered.data(), size, key(p), key(both ? p + 1 : p), LANES, size,
                      {value(p), both ? value(p + 1) : nullptr}, sums);
        for (int r = 0; r < ROWS; ++r)
            for (int half = 0; half < 2; ++half) write(&scores[r * span + (p + half) * LANES], sums[r][half] * scale);
    }
    float totals[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        float* row = &scores[r * span];
        const long whole = visible[r] / LANES * LANES, rest = visible[r] % LANES;
        for (long i = visible[r]; i < span; ++i) row[i] = -INFINITY;
        floats top = read(row);
        for (long i = LANES; i < whole + (rest ? LANES : 0); i += LANES) {
            const floats here = read(row + i);
            top = here > top ? here : top;
        }
        const floats most = all(greatest(top));
        floats mass{};
        const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (long i = 0; i < span; i += LANES) {
            floats weight = exponential(read(row + i) - most);
            weight = lane + int(i) < int(visible[r]) ? weight : floats{};
            write(&weights[r * span + i], weight);
            mass += weight;
        }
        totals[r] = sum(mass);
    }
    for (long d = 0; d < size; d += 2 * LANES) {
        floats sums[ROWS][2] = {};
        for (long p = 0; p < used; ++p) {
            Ahead<T> ahead;
            if (p < next.used) {
                ahead.one = next.keys + next.pages[p] * page_step + d * LANES;
                ahead.two = ahead.one + LANES * LANES;
            }
            tile<T, ROWS>(&weights[p * LANES], span, value(p) + place<T>(0, d, size),
                          value(p) + place<T>(0, d + LANES, size), size, LANES, ahead, sums);
        }
        for (int r = 0; r < ROWS; ++r)
            for (int half = 0; half < 2; ++half) write(outs[r] + d + half * LANES, sums[r][half] / totals[r]);
    }
}

// New tokens of several sequences, packed: sequence s has tokens firsts[s] .. firsts[s + 1] - 1, at positions starts[s]
// ..., and pages tables[s * width] ...
struct Sequences {
    const int64_t *firsts, *starts;
    const int32_t* tables;
    long count, width;
};

// Some tokens of a sequence and all heads of a group, or one token and some heads of a large group.
struct Task {
    long sequence, head, token, split;
};

// What `attend` works on, and how it is cut.
class Tasks {
   public:
    Tasks(const Sequences& of, const Shape& shape, int threads)
        : group(shape.heads / shape.kv_heads),
          tokens(group < MOST_ROWS ? MOST_ROWS / group : 1),
          splits((group + MOST_ROWS - 1) / MOST_ROWS) {
        for (long s = 0; s < of.count; ++s)
            for (long t = 0; t < of.firsts[s + 1] - of.firsts[s]; t += tokens)
                for (long h = 0; h < shape.kv_heads; ++h)
                    for (long split = 0; split < splits; ++split) list.push_back({s, h, t, split});
        portion = std::clamp(long(list.size()) / (16 * threads), 1L, 12L);  // neighbours share a sequence
    }
    long group, tokens, splits, portion;
    std::vector<Task> list;
};

// Rotates queries (in place) and keys, stores keys and values in their pages, attends to everything up to each token.
template <class T>
void attend(T* qkv, const T* cosine, const T* sine, T* keys, T* values, const Sequences& of, const Tasks& tasks, T* out,
            const Shape& shape) {
    const int64_t *firsts = of.firsts, *starts = of.starts;
    const long size = shape.size, group = tasks.group;
    const long row_step = (shape.heads + 2 * shape.kv_heads) * size, out_step = shape.heads * size;
    const long head_step = LANES * size, page_step = shape.kv_heads * head_step;
#pragma omp for schedule(dynamic, 4)
    for (long s = 0; s < of.count; ++s)
        for (long row = firsts[s]; row < firsts[s + 1]; ++row) {
            const long position = starts[s] + row - firsts[s], token = position % LANES;
            T* mine = qkv + row * row_step;
            const T *turn = cosine + position * size, *tilt = sine + position * size;
            for (long h = 0; h < shape.heads + shape.kv_heads; ++h) rotate(mine + h * size, turn, tilt, size);
            for (long h = 0; h < shape.kv_heads; ++h) {
                const T* key = mine + (shape.heads + h) * size;
                const T* value = key + shape.kv_heads * size;
                const long home = of.tables[s * of.width + position / LANES] * page_step + h * head_step;
                for (long d = 0; d < size; ++d) {
                    keys[home + place<T>(d, token, LANES)] = key[d];
                    values[home + place<T>(token, d, size)] = value[d];
                }
            }
        }
    std::vector<T> gathered(MOST_ROWS * size), weights;
    std::vector<float> scores;
    const auto tokens_of = [&](const Task& task) {
        const long left = firsts[task.sequence + 1] - firsts[task.sequence] - task.token;
        return left < tasks.tokens ? left : tasks.tokens;
    };
    const auto cached = [&](const Task& task) {
        const long visible = starts[task.sequence] + task.token + tokens_of(task);
        return Cached<T>{keys + task.head * head_step, values + task.head * head_step,
                         of.tables + task.sequence * of.width, (visible + LANES - 1) / LANES};
    };
#pragma omp for schedule(dynamic, tasks.portion)
    for (long i = 0; i < long(tasks.list.size()); ++i) {
        const Task& task = tasks.list[i];
        const long tokens = tokens_of(task);
        const long from = group * task.split / tasks.splits, to = group * (task.split + 1) / tasks.splits;
        const T* queries[MOST_ROWS];
        T* outs[MOST_ROWS];
        long visible[MOST_ROWS], rows = 0;
        for (long t = 0; t < tokens; ++t)
            for (long g = from; g < to; ++g, ++rows) {
                const long row = firsts[task.sequence] + task.token + t, head = task.head * group + g;
                queries[rows] = qkv + row * row_step + head * size;
                outs[rows] = out + row * out_step + head * size;
                visible[rows] = starts[task.sequence] + task.token + t + 1;
            }
        with_rows<MOST_ROWS>(rows, [&](auto constant) {
            const Cached<T> here = cached(task);
            const Cached<T> next = i + 1 < long(tasks.list.size()) ? cached(tasks.list[i + 1]) : Cached<T>{};
            mix<T, decltype(constant)::value>(queries, outs, visible, here, next, page_step, size, gathered, scores,
                                              weights);
        });
    }
}

// ---- a pass over the whole model

// Pointers as kernels.py writes them down: weights packed, gate and up 16 outputs of one and 16 of the other in turns.
template <class T>
struct Layer {
    const T *norm, *qkv, *qkv_bias, *out, *out_bias, *mlp_norm, *gate_up, *gate_up_bias, *down, *down_bias;
    T *keys, *values;
};
template <class T>
struct Network {
    const T *embedding, *norm, *head, *cosine, *sine;
    const Layer<T>* layers;
    int64_t depth, hidden, inner, vocab, heads, kv_heads, head_size;
};
// Room for every row: the stream, what is normalised, what a block adds, and the widest in between.
template <class T>
struct Room {
    T *stream, *normal, *step, *qkv, *mixed, *gated;
};

// Logits after the rows `wanted` (ascending; null: after all `rows`) of the packed `tokens`.
template <class T>
void forward(const Network<T>& net, float eps, const int64_t* tokens, long rows, const Sequences& of,
             const int64_t* wanted, long wants, const Room<T>& room, T* logits, int threads) {
    const Shape shape{net.heads, net.kv_heads, net.head_size};
    const Tasks tasks(of, shape, threads);
    const long hidden = net.hidden, mixed = net.heads * net.head_size;
    const long qkv = mixed + 2 * net.kv_heads * net.head_size;
#pragma omp parallel num_threads(threads)
    {
        long here = rows;
#pragma omp for
        for (long row = 0; row < rows; ++row)
            std::memcpy(room.stream + row * hidden, net.embedding + tokens[row] * hidden, hidden * sizeof(T));
        for (long l = 0; l < net.depth; ++l) {
            const Layer<T>& layer = net.layers[l];
            add_norm(room.stream, l ? room.step : nullptr, layer.norm, room.normal, rows, hidden, eps);
            linear(room.normal, layer.qkv, layer.qkv_bias, room.qkv, rows, hidden, qkv);
            attend(room.qkv, net.cosine, net.sine, layer.keys, layer.values, of, tasks, room.mixed, shape);
            linear(room.mixed, layer.out, layer.out_bias, room.step, rows, mixed, hidden);
            if (wanted && l + 1 == net.depth) {  // the last MLP is for the wanted rows only
                here = wants;
#pragma omp single
                for (long row = 0; row < wants; ++row)
                    for (T* each : {room.stream, room.step})
                        std::memmove(each + row * hidden, each + wanted[row] * hidden, hidden * sizeof(T));
            }
            add_norm(room.stream, room.step, layer.mlp_norm, room.normal, here, hidden, eps);
            linear<T, true>(room.normal, layer.gate_up, layer.gate_up_bias, room.gated, here, hidden, net.inner);
            linear(room.gated, layer.down, layer.down_bias, room.step, here, net.inner, hidden);
        }
        add_norm(room.stream, room.step, net.norm, room.normal, here, hidden, eps);
        linear(room.normal, net.head, static_cast<const T*>(nullptr), logits, here, hidden, net.vocab);
    }
}

}  // namespace

extern "C" {

long padded_outs(long outs) { return padded(outs); }

#define EXPORTS(T, NAME)                                                                                              \
    void add_norm_##NAME(void* x, const void* step, const void* weight, void* out, long rows, long size, float eps,   \
                         int threads) {                                                                               \
        _Pragma("omp parallel num_threads(threads)")                                                                  \
        add_norm((T*)x, (const T*)step, (const T*)weight, (T*)out, rows, size, eps);                                  \
    }                                                                                                                 \
    void pack_##NAME(const void* weight, void* packed, long outs, long size, int threads) {                           \
        pack((const T*)weight, (T*)packed, outs, size, threads);                                                      \
    }                                                                                                                 \
    void linear_##NAME(const void* x, const void* packed, const void* bias, void* out, long rows, long size,          \
                       long outs, int threads) {                                                                      \
        _Pragma("omp parallel num_threads(threads)")                                                                  \
        linear((const T*)x, (const T*)packed, (const T*)bias, (T*)out, rows, size, outs);                             \
    }                                                                                                                 \
    void attend_##NAME(void* qkv, const void* cosine, const void* sine, void* keys, void* values,                     \
                       const int64_t* firsts, const int64_t* starts, const int32_t* tables, void* out,                \
                       long sequences, long width, long heads, long kv_heads, long size, int threads) {               \
        const Shape shape{heads, kv_heads, size};                                                                     \
        const Sequences of{firsts, starts, tables, sequences, width};                                                 \
        const Tasks tasks(of, shape, threads);                                                                        \
        _Pragma("omp parallel num_threads(threads)")                                                                  \
        attend((T*)qkv, (const T*)cosine, (const T*)sine, (T*)keys, (T*)values, of, tasks, (T*)out, shape);           \
    }                                                                                                                 \
    void forward_##NAME(const void* network, float eps, const int64_t* tokens, long rows, const int64_t* firsts,      \
                        const int64_t* starts, const int32_t* tables, long sequences, long width,                     \
                        const int64_t* wanted, long wants, const void* room, void* logits, int threads) {             \
        forward(*(const Network<T>*)network, eps, tokens, rows, {firsts, starts, tables, sequences, width}, wanted,   \
                wants, *(const Room<T>*)room, (T*)logits, threads);                                                   \
    }
EXPORTS(float, float32)
EXPORTS(bf16, bfloat16)
}
