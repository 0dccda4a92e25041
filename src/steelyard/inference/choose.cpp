// The next token of every row. sampling.py says what and why; this is its `_draw` and `_greedy`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "vectors.h"

namespace {

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

#define EXPORTS(T, NAME)                                                                                       \
    void choose_##NAME(const void* logits, const void* settings, int64_t* tokens, long rows, long vocab,       \
                       int threads) {                                                                          \
        choose((const T*)logits, (const Settings*)settings, tokens, rows, vocab, threads);                     \
    }
EXPORTS(float, float32)
EXPORTS(bf16, bfloat16)
}
