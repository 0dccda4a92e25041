// Vectors of 16 floats, elements T (float, or bf16: the upper half of a float), and what the kernels compute of them.
//
// Vector types are the compiler's own (GCC, Clang), so any processor works.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;      // one AVX-512 register of floats; also the tokens of a page

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

}  // namespace
