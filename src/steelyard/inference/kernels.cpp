// The executor's arithmetic on the CPU. Everything that costs time is one tile: a few rows of inputs against 2 vectors
// of 16 outputs, over pairs of elements, all sums in registers. Products with weights, scores (queries with keys) and
// mixtures (weights with values) are laid out so that each is that tile.
//
// A row's result never depends on the other rows: the order of its sums is fixed by its own length alone. So the same
// request gives the same tokens in any batch, bit for bit.
//
// Elements T are float, or bf16 (the upper half of a float); sums are float. Pair layout: elements i and i + 1 of one
// lane lie side by side for bf16 (one instruction multiplies both), in two vectors for float. Vector types are the
// compiler's own (GCC, Clang), so any processor works; AVX-512 with BF16 has an instruction for the pair.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;             // one AVX-512 register of floats; also the tokens of a page
constexpr int MOST_ROWS = 13;         // of a tile: 26 of 32 registers accumulate
constexpr long PARALLEL_FROM = 8192;  // elements under which waking a second thread costs more than it saves

struct bf16 {
    uint16_t bits;
};
typedef float floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64), aligned(2), may_alias));
typedef int32_t ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));

inline floats read(const float* at) { return *reinterpret_cast<const floats*>(at); }
inline floats read(const bf16* at) {
    return (floats)(__builtin_convertvector(*reinterpret_cast<const halves*>(at), words) << 16);
}
// To the nearest bf16, ties to even, still as a float; NaN stays NaN.
inline floats nearest(floats x) {
    words bits = (words)x;
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return x == x ? (floats)bits : x;
}
inline void write(float* at, floats x) { *reinterpret_cast<floats*>(at) = x; }
inline void write(bf16* at, floats x) {
    *reinterpret_cast<halves*>(at) = __builtin_convertvector((words)nearest(x) >> 16, halves);
}
inline float read1(const float* at) { return *at; }
inline float read1(const bf16* at) {
    const uint32_t bits = uint32_t(at->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void write1(float* at, float x) { *at = x; }
inline void write1(bf16* at, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    at->bits = uint16_t(x == x ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : bits >> 16 | 0x40u);
}
template <class T>
inline floats rounded(floats x);  // to T and back
template <>
inline floats rounded<float>(floats x) {
    return x;
}
template <>
inline floats rounded<bf16>(floats x) {
    return nearest(x);
}
inline floats all(float x) { return floats{} + x; }
inline floats shifted(floats x, int by) {  // lanes i and i ^ by change places
    const ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return __builtin_shuffle(x, lane ^ by);
}
inline float sum(floats x) {
    for (int by = 8; by; by /= 2) x += shifted(x, by);
    return x[0];
}
inline float greatest(floats x) {
    for (int by = 8; by; by /= 2) {
        const floats y = shifted(x, by);
        x = x > y ? x : y;
    }
    return x[0];
}

// e^x: range reduction by ln 2 in two parts, Taylor to degree 7; relative error under 3e-7 for x in [-87, 88].
inline floats exponential(floats x) {
    const floats low = all(-87.0f), high = all(88.0f);
    floats in = x < low ? low : x;
    in = in > high ? high : in;
    const floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const floats whole = in * 1.44269504f + shift - shift;
    const floats r = in - whole * 0.693145752f - whole * 1.42860677e-6f;
    floats p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const ints power = (__builtin_convertvector(whole, ints) + 127) << 23;
    const floats result = p * (floats)power;
    return x == x ? result : x;
}

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
template <class T, bool GATED>
void linear(const T* x, const T* packed, const T* bias, T* out, long rows, long size, long outs, int threads) {
    const long panels = GATED ? outs / LANES * 2 : padded(outs) / LANES;
    constexpr long CHUNK = 20 * MOST_ROWS;  // rows at a time, so that inputs stay in the second-level cache
    const long panel_step = LANES * size;
#pragma omp parallel num_threads(threads)
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
}

// ---- norms

// x += step; out = x / rms(x) * weight, rounded where the reference rounds. size is a multiple of LANES.
template <class T>
void add_norm(T* x, const T* step, const T* weight, T* out, long rows, long size, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * size >= PARALLEL_FROM)
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

// Attention of new tokens of several sequences, packed: sequence s has tokens firsts[s] .. firsts[s + 1] - 1 of qkv, at
// positions starts[s] ... Rotates queries (in place) and keys, stores keys and values in their pages, attends to
// everything up to each token.
template <class T>
void attend(T* qkv, const T* cosine, const T* sine, T* keys, T* values, const int64_t* firsts, const int64_t* starts,
            const int32_t* tables, T* out, long sequences, long width, Shape shape, int threads) {
    const long size = shape.size, group = shape.heads / shape.kv_heads;
    const long row_step = (shape.heads + 2 * shape.kv_heads) * size, out_step = shape.heads * size;
    const long head_step = LANES * size, page_step = shape.kv_heads * head_step;
    // A block: some tokens and all heads of a group, or one token and some heads of a large group
    const long block_tokens = group < MOST_ROWS ? MOST_ROWS / group : 1;
    const long splits = (group + MOST_ROWS - 1) / MOST_ROWS;
    struct Task {
        long sequence, head, token, split;
    };
    std::vector<Task> tasks;
    for (long s = 0; s < sequences; ++s)
        for (long t = 0; t < firsts[s + 1] - firsts[s]; t += block_tokens)
            for (long h = 0; h < shape.kv_heads; ++h)
                for (long split = 0; split < splits; ++split) tasks.push_back({s, h, t, split});
    const long portion = std::clamp(long(tasks.size()) / (16 * threads), 1L, 12L);  // neighbours share a sequence
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 4)
        for (long s = 0; s < sequences; ++s)
            for (long row = firsts[s]; row < firsts[s + 1]; ++row) {
                const long position = starts[s] + row - firsts[s], token = position % LANES;
                T* mine = qkv + row * row_step;
                const T *turn = cosine + position * size, *tilt = sine + position * size;
                for (long h = 0; h < shape.heads + shape.kv_heads; ++h) rotate(mine + h * size, turn, tilt, size);
                for (long h = 0; h < shape.kv_heads; ++h) {
                    const T* key = mine + (shape.heads + h) * size;
                    const T* value = key + shape.kv_heads * size;
                    const long home = tables[s * width + position / LANES] * page_step + h * head_step;
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
            return left < block_tokens ? left : block_tokens;
        };
        const auto cached = [&](const Task& task) {
            const long visible = starts[task.sequence] + task.token + tokens_of(task);
            return Cached<T>{keys + task.head * head_step, values + task.head * head_step,
                             tables + task.sequence * width, (visible + LANES - 1) / LANES};
        };
#pragma omp for schedule(dynamic, portion)
        for (long i = 0; i < long(tasks.size()); ++i) {
            const Task& task = tasks[i];
            const long tokens = tokens_of(task);
            const long from = group * task.split / splits, to = group * (task.split + 1) / splits;
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
                const Cached<T> next = i + 1 < long(tasks.size()) ? cached(tasks[i + 1]) : Cached<T>{};
                mix<T, decltype(constant)::value>(queries, outs, visible, here, next, page_step, size, gathered, scores,
                                                  weights);
            });
        }
    }
}

// ---- the next token (sampling.py says what and why; this is its `_draw` and `_greedy`)

constexpr long BLOCK = 256;    // token ids of a block
constexpr float FAINT = -80;   // scaled logits under this weigh as much as this

struct Settings {
    float temperature, top_p, min_p;  // temperature 0: greedy; top_p over 1 and min_p 0: off
    int32_t top_k;                    // 0: off
    uint64_t seed;
    uint32_t position, unused;
};

// Number i of a (seed, position): Philox4x32-10's word i % 4 of counter (i / 4, position), as a Gumbel number.
class Noise {
   public:
    Noise(uint64_t seed, uint32_t position) : seed_(seed), position_(position) {}
    float at(uint32_t i) {
        if (i / 4 != quad_) draw(i / 4);
        return float(-std::log(-std::log((words_[i % 4] + 0.5) * 0x1p-32)));
    }

   private:
    void draw(uint32_t quad) {
        uint32_t c[4] = {quad, position_, 0, 0}, k0 = uint32_t(seed_), k1 = uint32_t(seed_ >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t left = uint64_t(0xD2511F53) * c[0], right = uint64_t(0xCD9E8D57) * c[2];
            const uint32_t next[4] = {uint32_t(right >> 32) ^ c[1] ^ k0, uint32_t(right),
                                      uint32_t(left >> 32) ^ c[3] ^ k1, uint32_t(left)};
            std::memcpy(c, next, sizeof c);
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        std::memcpy(words_, c, sizeof c);
        quad_ = quad;
    }
    uint64_t seed_;
    uint32_t position_, quad_ = UINT32_MAX, words_[4];
};

// Descending, the scaled logits of at least `cut`.
void leading(const std::vector<float>& scaled, float cut, std::vector<float>& found) {
    found.clear();
    for (size_t i = 0; i < scaled.size(); i += LANES) {
        const ints over = read(&scaled[i]) >= cut;
        if (greatest((floats)(over & 0x3f800000)) == 0) continue;  // 1.0 where it is
        for (int j = 0; j < LANES; ++j)
            if (over[j]) found.push_back(scaled[i + j]);
    }
    std::sort(found.begin(), found.end(), std::greater<float>());
}

// The lowest scaled logit that top-k, top-p and min-p keep. `tops` are the largest logits of disjoint groups of tokens.
float threshold(const std::vector<float>& scaled, std::vector<float>& tops, long vocab, float total, const Settings& set,
                std::vector<float>& found) {
    const bool k_on = set.top_k > 0 && set.top_k < vocab, p_on = set.top_p < 1;
    const float least = set.min_p > 0 ? std::log(set.min_p) : -INFINITY;
    if (!k_on && !p_on) return least;
    // As many logits as there are groups with a top of at least `cut` lie over it: enough for top-k, mostly for top-p
    const size_t enough = k_on ? set.top_k : 256;
    float cut = -INFINITY;
    if (enough <= tops.size()) {
        std::nth_element(tops.begin(), tops.begin() + enough - 1, tops.end(), std::greater<float>());
        cut = tops[enough - 1];
    }
    // Without top-k: all tokens lighter than this together weigh less than top-p cuts
    const float sure = std::log((1 - set.top_p) * total / vocab);
    for (;;) {
        leading(scaled, cut, found);
        if (k_on) {
            found.resize(set.top_k);
            total = 0;
            for (float x : found) total += std::exp(x);
        }
        size_t last = found.size() - 1;
        if (p_on) {
            float running = 0;
            for (last = 0; last < found.size(); ++last)
                if ((running += std::exp(found[last])) >= set.top_p * total) break;
        }
        if (last < found.size()) return found[last] > least ? found[last] : least;
        if (k_on || cut <= sure) return found.back() > least ? found.back() : least;  // rounding kept it from its share
        cut = sure;
    }
}

template <class T>
int64_t choose_row(const T* logits, long vocab, const Settings& set, std::vector<float>& scaled,
                   std::vector<float>& found) {
    const long whole = vocab / LANES * LANES;
    floats high = all(-INFINITY), odd{};
    for (long i = 0; i < whole; i += LANES) {
        const floats x = read(logits + i);
        high = x > high ? x : high;
        odd += x - x;  // NaN as soon as one is NaN or infinite
    }
    float top = greatest(high), strange = sum(odd);
    for (long i = whole; i < vocab; ++i) {
        const float x = read1(logits + i);
        top = x > top ? x : top;
        strange += x - x;
    }
    if (strange != 0) {  // an infinite low logit is a ban; a NaN, or an infinite best one, is a broken model
        for (long i = 0; i < vocab; ++i)
            if (std::isnan(read1(logits + i))) return -1;
        if (std::isinf(top)) return -1;
    }
    if (set.temperature == 0) {
        for (long i = 0;; ++i)
            if (read1(logits + i) == top) return i;
    }
    const long blocks = (vocab + BLOCK - 1) / BLOCK;
    scaled.assign(blocks * BLOCK, -INFINITY);
    const float heat = set.temperature > 1.17549435e-38f ? set.temperature : 1.17549435e-38f;
    std::vector<float> mass(blocks), tops(blocks * LANES);
    float total = 0;
    for (long b = 0; b < blocks; ++b) {
        float* part = &scaled[b * BLOCK];
        floats weights{}, highest = all(-INFINITY);
        const long count = vocab - b * BLOCK < BLOCK ? vocab - b * BLOCK : BLOCK;
        for (long i = 0; i < count; i += LANES) {
            if (i + LANES <= count) {
                write(part + i, (read(logits + b * BLOCK + i) - top) / heat);
            } else {
                for (long j = i; j < count; ++j) part[j] = (read1(logits + b * BLOCK + j) - top) / heat;
            }
            const floats x = read(part + i);
            const floats weight = exponential(x < FAINT ? all(FAINT) : x);
            weights += x > -INFINITY ? weight : floats{};
            highest = x > highest ? x : highest;
        }
        write(&tops[b * LANES], highest);
        total += mass[b] = sum(weights);
    }
    const float least = threshold(scaled, tops, vocab, total, set, found);
    if (least > -INFINITY)
        for (long b = 0; b < blocks; ++b) {
            floats weights{};
            for (long i = b * BLOCK; i < (b + 1) * BLOCK; i += LANES) {
                const floats x = read(&scaled[i]);
                weights += x >= least ? exponential(x < FAINT ? all(FAINT) : x) : floats{};
            }
            mass[b] = sum(weights);
        }
    Noise noise(set.seed, set.position);
    long block = 0, token = 0;
    float best = -INFINITY;
    for (long b = 0; b < blocks; ++b) {
        if (mass[b] == 0) continue;
        const float score = std::log(mass[b]) + noise.at(uint32_t(BLOCK + b));
        if (score > best) best = score, block = b;
    }
    best = -INFINITY;
    for (long i = 0; i < BLOCK; ++i) {
        const float x = scaled[block * BLOCK + i];
        if (x < least || x == -INFINITY) continue;
        const float score = x + noise.at(uint32_t(i));
        if (score > best) best = score, token = block * BLOCK + i;
    }
    return token;
}

template <class T>
void choose(const T* logits, const Settings* settings, int64_t* tokens, long rows, long vocab, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scaled, found;
#pragma omp for schedule(dynamic, 1)
        for (long row = 0; row < rows; ++row)
            tokens[row] = choose_row(logits + row * vocab, vocab, settings[row], scaled, found);
    }
}

}  // namespace

extern "C" {

long padded_outs(long outs) { return padded(outs); }

#define EXPORTS(T, NAME)                                                                                              \
    void add_norm_##NAME(void* x, const void* step, const void* weight, void* out, long rows, long size, float eps,   \
                         int threads) {                                                                               \
        add_norm((T*)x, (const T*)step, (const T*)weight, (T*)out, rows, size, eps, threads);                         \
    }                                                                                                                 \
    void pack_##NAME(const void* weight, void* packed, long outs, long size, int threads) {                           \
        pack((const T*)weight, (T*)packed, outs, size, threads);                                                      \
    }                                                                                                                 \
    void linear_##NAME(const void* x, const void* packed, const void* bias, void* out, long rows, long size,          \
                       long outs, int threads) {                                                                      \
        linear<T, false>((const T*)x, (const T*)packed, (const T*)bias, (T*)out, rows, size, outs, threads);          \
    }                                                                                                                 \
    void gated_##NAME(const void* x, const void* packed, const void* bias, void* out, long rows, long size,           \
                      long outs, int threads) {                                                                       \
        linear<T, true>((const T*)x, (const T*)packed, (const T*)bias, (T*)out, rows, size, outs, threads);           \
    }                                                                                                                 \
    void attend_##NAME(void* qkv, const void* cosine, const void* sine, void* keys, void* values,                     \
                       const int64_t* firsts, const int64_t* starts, const int32_t* tables, void* out,                \
                       long sequences, long width, long heads, long kv_heads, long size, int threads) {               \
        attend((T*)qkv, (const T*)cosine, (const T*)sine, (T*)keys, (T*)values, firsts, starts, tables, (T*)out,      \
               sequences, width, Shape{heads, kv_heads, size}, threads);                                              \
    }                                                                                                                 \
    void choose_##NAME(const void* logits, const void* settings, int64_t* tokens, long rows, long vocab,              \
                       int threads) {                                                                                 \
        choose((const T*)logits, (const Settings*)settings, tokens, rows, vocab, threads);                            \
    }
EXPORTS(float, float32)
EXPORTS(bf16, bfloat16)
}
