// What native.cpp and integers.cpp share: vectors as wide as the processor has them, and numbers in bfloat16. Plain C++ for every
// compiler; the instructions of x86 are used where the compiler says that they are there.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__BMI2__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * W)));

#define INLINE inline __attribute__((always_inline))

enum Kind { FLOAT32 = 0, BFLOAT16 = 1 };

template <class V, class T> static INLINE V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

static INLINE float from_bfloat16(uint16_t half) {
  uint32_t bits = uint32_t(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// To the nearest, ties to even. A number, or infinite.
static INLINE uint16_t number_to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

static INLINE uint16_t to_bfloat16(float value) { return value != value ? 0x7FC0 : number_to_bfloat16(value); }
