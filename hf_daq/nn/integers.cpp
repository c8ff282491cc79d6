// Layers whose inputs and weights are whole numbers: inputs in float32 or bfloat16 are rounded to codes, then come products
// and sums, exact in 32 bits, then a scale and a bias. whole.py arranges the weights and calls it. Images are channels last
// inside; a linear layer is a convolution of images of one column.
//
// A task takes some rows of outputs: it rounds the rows of inputs that they need into a buffer that stays in the cache, with
// the code of zero around the image, and computes from there.

#include "vectors.h"

#if (defined(__AVX512F__) && defined(__AVX512VNNI__)) || (!defined(__AVX512F__) && defined(__AVXVNNI__))
#define ADDS_PRODUCTS 1  // four products of bytes are added to a sum of 32 bits
#elif defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define ADDS_PAIRS 1  // two of bytes to one of 16 bits, or two of 16 bits to one of 32
#endif
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef int16_t Shorts __attribute__((vector_size(4 * W)));

constexpr int64_t CACHE = 3 << 17;  // bytes of inputs in a buffer
constexpr float SMALLEST_STEP = 1.1920929e-7f;

// As whole.py declares it. `channels`, `outputs`: of all groups. kernel, stride, dilation: rows, columns.
struct Whole {
  int64_t weight;  // bytes from here on, as the next two. depthwise: float, (1 + kernel, channels), `first` before the rest; else int8, (groups, blocks of W outputs, runs, size of a run / 4, W, 4)
  int64_t first;   // of each output in these blocks: where its sum starts
  int64_t scale;   // likewise, of its sum
  int64_t channels, outputs, groups, kernel[2], stride[2], dilation[2];
  int32_t depthwise, halves, zero, tokens;  // halves: to twice the sum that of the inputs is added
  int64_t steps;                            // ADDS_PAIRS: how many sums of two products 16 bits hold; with 0 weights are int16, (..., size / 2, W, 2)
  float start, inverse, levels;             // tokens: a scale for each row instead of start and inverse, for linear layers

  template <class T> const T* at(int64_t bytes) const { return (const T*)((const char*)this + bytes); }
};
struct Image {
  const void* x;
  const float* bias;
  void* y;  // channels last
  int64_t count, height, width, top, left, out_height, out_width;
  int32_t channels_last, kind, out_kind, threads;
};

// ------------------------------------------------------------------------------------------- inputs to codes

struct Rounding {
  float start, inverse, levels;
  INLINE float one(float x, bool& bad) const {
    bad |= x != x;
    float v = (x - start) * inverse;
    v = v > 0 ? v : 0;
    return std::ceil((v < levels ? v : levels) - 0.5f);
  }
};

static INLINE Floats floats_of(const float* p) { return load<Floats>(p); }
static INLINE Floats floats_of(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  float f[W];
  for (int i = 0; i < W; i++) f[i] = from_bfloat16(p[i]);
  return load<Floats>(f);
#endif
}
static INLINE float float_of(float value) { return value; }
static INLINE float float_of(uint16_t value) { return from_bfloat16(value); }

static INLINE Floats ceil_of(Floats v) {
#if defined(__AVX512F__)
  return (Floats)_mm512_roundscale_ps((__m512)v, 0x0A);
#elif defined(__AVX2__)
  return (Floats)_mm256_ceil_ps((__m256)v);
#else
  for (int i = 0; i < W; i++) v[i] = std::ceil(v[i]);
  return v;
#endif
}

static INLINE void store(Floats v, uint8_t* out) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32((__m512)v)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_shuffle_epi8(_mm256_cvttps_epi32((__m256)v), _mm256_set1_epi32(0x0C080400));
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64((__m128i*)out, both);
#else
  Ints k = __builtin_convertvector(v, Ints);
  for (int i = 0; i < W; i++) out[i] = uint8_t(k[i]);
#endif
}

// Remembers whether one was NaN.
struct Numbers {
#if defined(__AVX512F__)
  __mmask16 nan = 0;
  INLINE void add(Floats f) { nan |= _mm512_cmp_ps_mask((__m512)f, (__m512)f, _CMP_UNORD_Q); }
  INLINE bool bad() const { return nan; }
#else
  Ints nan = {};
  INLINE void add(Floats f) { nan |= f != f; }
  INLINE bool bad() const {
    bool found = false;
    for (int i = 0; i < W; i++) found |= nan[i] != 0;
    return found;
  }
#endif
};

// Returns whether one is NaN.
template <class From> static bool round_to_codes(const From* x, int64_t size, const Rounding& r, uint8_t* out) {
  const Floats none = {}, most = none + r.levels;
  Numbers all;
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    Floats f = floats_of(x + i), v = (f - r.start) * r.inverse;
    all.add(f);
    v = v > none ? v : none;
    v = v < most ? v : most;
    store(ceil_of(v - 0.5f), out + i);
  }
  bool bad = all.bad();
  for (; i < size; i++) out[i] = uint8_t(r.one(float_of(x[i]), bad));
  return bad;
}

// The scale of a row, as `formula.token_scale` has it: a number of the kind of the row. Infinite or NaN where a value is.
static INLINE float in_kind(float value, const float*) { return value; }
static INLINE float in_kind(float value, const uint16_t*) { return from_bfloat16(to_bfloat16(value)); }
template <class From> static float scale_of(const From* x, int64_t size, float levels) {
  const Floats none = {};
  Floats most = none;
  Numbers all;
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    Floats f = floats_of(x + i);
    all.add(f);
    f = f < none ? -f : f;
    most = f > most ? f : most;
  }
  float largest = 0;
  bool bad = all.bad();
  for (int k = 0; k < W; k++) largest = most[k] > largest ? most[k] : largest;
  for (; i < size; i++) {
    const float f = std::fabs(float_of(x[i]));
    bad |= f != f;
    largest = f > largest ? f : largest;
  }
  const float step = in_kind(largest / (levels / 2), x);
  return bad ? NAN : step > SMALLEST_STEP ? step : SMALLEST_STEP;
}

static INLINE Floats round_of(Floats v) {  // ties to even
#if defined(__AVX512F__)
  return (Floats)_mm512_roundscale_ps((__m512)v, 0x08);
#elif defined(__AVX2__)
  return (Floats)_mm256_round_ps((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  for (int i = 0; i < W; i++) v[i] = std::nearbyint(v[i]);
  return v;
#endif
}

// `TokenQuantizer.codes` of a row with this scale.
template <class From> static void round_row(const From* x, int64_t size, float scale, float levels, float zero, uint8_t* out) {
  const float inverse = 1 / scale;
  const Floats none = {}, least = none - zero, most = least + levels;
  int64_t i = 0;
  for (; i + W <= size; i += W) {
    Floats v = round_of(floats_of(x + i) * inverse);
    v = v > least ? v : least;
    v = v < most ? v : most;
    store(v + zero, out + i);
  }
  for (; i < size; i++) {
    float v = std::nearbyint(float_of(x[i]) * inverse) + zero;
    v = v > 0 ? v : 0;
    out[i] = uint8_t(v < levels ? v : levels);
  }
}

// ------------------------------------------------------------------------------------------------- the buffer

// Memory that a thread keeps for its next task.
struct Room {
  void* data = nullptr;
  int64_t size = 0;
  ~Room() { free(data); }
  void* of(int64_t bytes) {
    if (bytes > size) free(data), data = malloc(bytes), size = data ? bytes : 0;
    return data;
  }
};

// Rows of images as a task has them: pixels of `pixel` values, of which each group has `padded` for its `channels`.
struct Buffer {
  uint8_t* data;
  int64_t columns, pixel, group, padded;
  uint8_t outside;

  template <class From> bool read(const Whole& a, const Image& b, int64_t n, int64_t first, int64_t rows) const {
    const Rounding rounding{a.start, a.inverse, a.levels};
    const int64_t left = b.left < columns ? b.left : columns, area = b.height * b.width;
    const int64_t width = b.width < columns - left ? b.width : columns - left;  // the last columns may not be needed
    const bool dense = group == padded && pixel == a.channels;
    bool bad = false;
    uint8_t* row = data;
    if (dense && b.channels_last && !b.left && columns == b.width && first >= 0 && first + rows <= b.height)  // all at once
      return round_to_codes((const From*)b.x + (n * area + first * b.width) * pixel, rows * columns * pixel, rounding,
                            row);
    for (int64_t y = first; y < first + rows; y++, row += columns * pixel) {
      if (y < 0 || y >= b.height || !dense) fill(row, columns);
      if (y < 0 || y >= b.height) continue;
      uint8_t* out = row + left * pixel;
      fill(row, left), fill(out + width * pixel, columns - left - width);
      if (!b.channels_last) {
        bad |= transposed((const From*)b.x + n * a.channels * area + y * b.width, area, width, a, rounding, out);
        continue;
      }
      const From* x = (const From*)b.x + (n * area + y * b.width) * a.channels;
      if (dense)
        bad |= round_to_codes(x, width * pixel, rounding, out);
      else
        for (int64_t i = 0; i < width; i++, out += pixel)
          for (int64_t c = 0; c < a.channels; c += group, x += group)
            bad |= round_to_codes(x, group, rounding, out + c / group * padded);
    }
    return bad;
  }

  // Rows of a linear layer, each with a scale.
  template <class From>
  bool read_rows(const Whole& a, const Image& b, int64_t first, int64_t rows, float* scales) const {
    bool bad = false;
    if (group != padded) fill(data, rows);
    for (int64_t i = 0; i < rows; i++) {
      const From* x = (const From*)b.x + (first + i) * a.channels;
      scales[i] = scale_of(x, a.channels, a.levels);
      if (!(scales[i] < INFINITY)) scales[i] = NAN, bad = true;
      round_row(x, a.channels, scales[i], a.levels, float(a.zero), data + i * pixel);
    }
    return bad;
  }

  void fill(uint8_t* out, int64_t count) const { memset(out, outside, count * pixel); }

  // A row of images whose channels lie `area` apart.
  template <class From>
  bool transposed(const From* x, int64_t area, int64_t width, const Whole& a, const Rounding& rounding,
                  uint8_t* out) const {
    bool bad = false;
    uint8_t block[32][64];
    for (int64_t i = 0; i < width; i += 64)
      for (int64_t c = 0; c < a.channels; c += 32) {
        int64_t across = width - i < 64 ? width - i : 64, deep = a.channels - c < 32 ? a.channels - c : 32;
        for (int64_t k = 0; k < deep; k++)
          bad |= round_to_codes(x + (c + k) * area + i, across, rounding, block[k]);
        for (int64_t j = 0; j < across; j++) {
          uint8_t* at = out + (i + j) * pixel;
          if (group == padded || group == a.channels)
            for (int64_t k = 0; k < deep; k++) at[c + k] = block[k][j];
          else
            for (int64_t k = 0; k < deep; k++) at[(c + k) / group * padded + (c + k) % group] = block[k][j];
        }
      }
    return bad;
  }
};

// ---------------------------------------------------------------------------------------------------- outputs

// The first `size` of W outputs in each of some blocks: scale * sum + bias.
struct Outputs {
  void* y;
  const float *scale, *bias;
  int64_t size;
  int kind;

  INLINE void put(Floats sum, int block, int64_t at) const {
    Floats v = sum * load<Floats>(scale + W * block) + load<Floats>(bias + W * block);
    const int64_t left = size - W * block;
    if (kind == FLOAT32) {
      float* to = (float*)y + at + W * block;
#if defined(__AVX512F__)
      _mm512_mask_storeu_ps(to, left < W ? (1u << left) - 1 : 0xFFFF, (__m512)v);
#else
      if (left < W)
        memcpy(to, &v, 4 * left);
      else
        memcpy(to, &v, 4 * W);
#endif
    } else {
      uint16_t halves[W];
      for (int i = 0; i < W; i++) halves[i] = to_bfloat16(v[i]);
      memcpy((uint16_t*)y + at + W * block, halves, left < W ? 2 * left : 2 * W);
    }
  }
};

// The bias from a channel on, with room behind it.
struct Bias {
  float copy[4 * W] = {};
  INLINE const float* of(const Whole& a, const Image& b, int64_t channel, int64_t count) {
    if (b.bias && channel + count <= a.outputs) return b.bias + channel;
    for (int64_t i = 0; b.bias && channel + i < a.outputs; i++) copy[i] = b.bias[channel + i];
    return copy;
  }
};

// The largest of equal parts of what is left.
static INLINE int part(int64_t left, int most) { return int((left + (left + most - 1) / most - 1) / ((left + most - 1) / most)); }

static INLINE Floats floats_of(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  float f[W];
  for (int i = 0; i < W; i++) f[i] = float(int(p[i]));
  return load<Floats>(f);
#endif
}

// X pixels of a row, W channels, in floats, which hold these sums exactly; `at`: of the first in the output. K, S: columns of the
// kernel, and of a step, where they are known.
template <int X, int K, int S>
static void strip(const Whole& a, const uint8_t* x, int64_t columns, int64_t pixel, const float* weight,
                  const Outputs& out, const int64_t at) {
  const Outputs put = out;
  const int64_t outputs = a.outputs, next = a.dilation[1] * pixel, below = a.dilation[0] * columns * pixel;
  Floats sum[X];
  for (int i = 0; i < X; i++) sum[i] = load<Floats>(weight);
  weight += pixel;
  for (int64_t ky = 0; ky < a.kernel[0]; ky++, x += below)
    if constexpr (K > 0) {
      Floats in[(X - 1) * S + K];
#pragma GCC unroll 20
      for (int i = 0; i < (X - 1) * S + K; i++) in[i] = floats_of(x + i * pixel);
#pragma GCC unroll 8
      for (int kx = 0; kx < K; kx++, weight += pixel) {
        Floats w = load<Floats>(weight);
#pragma GCC unroll 8
        for (int i = 0; i < X; i++) sum[i] += w * in[i * S + kx];
      }
    } else {
      for (int64_t kx = 0; kx < a.kernel[1]; kx++, weight += pixel) {
        Floats w = load<Floats>(weight);
#pragma GCC unroll 8
        for (int i = 0; i < X; i++) sum[i] += w * floats_of(x + i * a.stride[1] * pixel + kx * next);
      }
    }
#pragma GCC unroll 8
  for (int i = 0; i < X; i++) put.put(sum[i], 0, at + i * outputs);
}

typedef void (*Strip)(const Whole&, const uint8_t*, int64_t, int64_t, const float*, const Outputs&, int64_t);
#define STRIPS(K, S) {strip<1, K, S>, strip<2, K, S>, strip<3, K, S>, strip<4, K, S>, strip<5, K, S>, strip<6, K, S>, strip<7, K, S>}
static const Strip STRIP[5][7] = {STRIPS(0, 0), STRIPS(3, 1), STRIPS(3, 2), STRIPS(5, 1), STRIPS(5, 2)};

static void depthwise(const Whole& a, const Image& b, const Buffer& in, int64_t rows, int64_t at) {
  const bool known = (a.kernel[1] == 3 || a.kernel[1] == 5) && a.stride[1] < 3 && a.dilation[1] == 1;
  const Strip* strips = STRIP[known ? a.kernel[1] - 3 + a.stride[1] : 0];
  Bias bias;
  for (int64_t y = 0; y < rows; y++)
    for (int64_t x = 0, size; x < b.out_width; x += size) {
      size = part(b.out_width - x, 7);
      const uint8_t* from = in.data + (y * a.stride[0] * in.columns + x * a.stride[1]) * in.pixel;
      const int64_t pixel = at + y * b.out_width + x;
      for (int64_t c = 0; c < a.outputs; c += W) {
        const Outputs out{b.y, a.at<float>(a.scale) + c, bias.of(a, b, c, W), a.outputs - c, b.out_kind};
        strips[size - 1](a, from + c, in.columns, in.pixel, a.at<float>(a.weight) + c, out, pixel * a.outputs + c);
      }
    }
}

// Whether inputs are multiplied in 16 bits.
static INLINE bool in_shorts(const Whole& a) {
#if ADDS_PAIRS
  return !a.depthwise && !a.steps;
#else
  return false;
#endif
}

#if ADDS_PRODUCTS || ADDS_PAIRS
#if defined(__AVX512F__)
constexpr int PIXELS = 6, BLOCKS = 4;  // whose sums stay in registers
#else
constexpr int PIXELS = 6, BLOCKS = 2;
#endif

// Where the inputs of a pixel lie: runs of `used` inputs that lie one after the other, the runs `row` or `column` bytes apart.
// size: in bytes, a multiple of 4; weights are 0 behind what is used.
struct Runs {
  int64_t rows, columns, used, size, row, column;
};

// What is added to twice the sums of a pixel, where weights mean half a code more.
template <class T> static int32_t sum_of_inputs(const Runs& runs, const uint8_t* pixel, int32_t zero) {
  int32_t sum = -zero * int32_t(runs.rows * runs.columns * runs.used);
  for (int64_t ky = 0; ky < runs.rows; ky++)
    for (int64_t kx = 0; kx < runs.columns; kx++) {
      const T* x = (const T*)(pixel + ky * runs.row + kx * runs.column);
      for (int64_t k = 0; k < runs.used; k++) sum += x[k];
    }
  return sum;
}

static INLINE Ints add_products(Ints sum, Ints inputs, Ints weight) {
#if ADDS_PAIRS && defined(__AVX512F__)  // inputs in 16 bits
  return sum + (Ints)_mm512_madd_epi16((__m512i)inputs, (__m512i)weight);
#elif ADDS_PAIRS
  return sum + (Ints)_mm256_madd_epi16((__m256i)inputs, (__m256i)weight);
#elif defined(__AVX512F__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)inputs, (__m512i)weight);
#else
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)inputs, (__m256i)weight);
#endif
}

// Adds the products of `size` bytes of P pixels with those of B blocks of weights, which lie `block` bytes apart.
template <int P, int B>
static INLINE void add_run(Ints (&sum)[P][B], const uint8_t* const (&x)[P], const int8_t* weight, int64_t block, int64_t size) {
  for (int64_t k = 0; k < size; k += 4, weight += 4 * W) {
    Ints w[B];
    for (int j = 0; j < B; j++) w[j] = load<Ints>(weight + j * block);
    for (int i = 0; i < P; i++) {
      const Ints none = {};
      Ints inputs = none + load<int32_t>(x[i] + k);
      for (int j = 0; j < B; j++) sum[i][j] = add_products(sum[i][j], inputs, w[j]);
    }
  }
}

#if ADDS_PAIRS
static INLINE Shorts pairs_of(Ints bytes, Ints weight) {
#if defined(__AVX512F__)
  return (Shorts)_mm512_maddubs_epi16((__m512i)bytes, (__m512i)weight);
#else
  return (Shorts)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)weight);
#endif
}

// The same of bytes, of which `steps` sums of two products fit in 16 bits.
template <int P, int B>
static INLINE void add_run(Ints (&sum)[P][B], const uint8_t* const (&x)[P], const int8_t* weight, int64_t block,
                           int64_t size, int64_t steps) {
  const Ints none = {};
  for (int64_t k = 0; k < size;) {
    Shorts part[P][B] = {};
    const int64_t end = size - k < 4 * steps ? size : k + 4 * steps;
    for (; k < end; k += 4, weight += 4 * W) {
      Ints w[B];
      for (int j = 0; j < B; j++) w[j] = load<Ints>(weight + j * block);
      for (int i = 0; i < P; i++) {
        const Ints bytes = none + load<int32_t>(x[i] + k);
        for (int j = 0; j < B; j++) part[i][j] += pairs_of(bytes, w[j]);
      }
    }
    const Shorts ones = Shorts{} + int16_t(1);
    for (int i = 0; i < P; i++)
      for (int j = 0; j < B; j++) sum[i][j] = add_products(sum[i][j], (Ints)part[i][j], (Ints)ones);
  }
}
#endif

// P pixels, with what their sums are multiplied by; B blocks of W outputs each; `at`: of the first in the output.
template <int P, int B>
static void tile(const Whole& a, const Runs& runs, const uint8_t* const* pixels, const float* factors,
                 const int8_t* weight, const int32_t* first, const Outputs& out, const int64_t at) {
  const Outputs put = out;
  const int64_t outputs = a.outputs, block = runs.rows * runs.columns * runs.size * W;
  Ints sum[P][B];
  for (int j = 0; j < B; j++)
    for (int i = 0; i < P; i++) sum[i][j] = load<Ints>(first + W * j);
  for (int64_t ky = 0; ky < runs.rows; ky++)
    for (int64_t kx = 0; kx < runs.columns; kx++, weight += runs.size * W) {
      const uint8_t* x[P];
      for (int i = 0; i < P; i++) x[i] = pixels[i] + ky * runs.row + kx * runs.column;
#if ADDS_PAIRS
      if (a.steps) {
        add_run<P, B>(sum, x, weight, block, runs.size, a.steps);
        continue;
      }
#endif
      add_run<P, B>(sum, x, weight, block, runs.size);
    }
  if (a.halves)
    for (int i = 0; i < P; i++) {
      const int32_t inputs = in_shorts(a) ? sum_of_inputs<uint16_t>(runs, pixels[i], a.zero) : sum_of_inputs<uint8_t>(runs, pixels[i], a.zero);
      for (int j = 0; j < B; j++) sum[i][j] = sum[i][j] * 2 + inputs;
    }
#pragma GCC unroll 8
  for (int i = 0; i < P; i++)
#pragma GCC unroll 4
    for (int j = 0; j < B; j++) put.put(__builtin_convertvector(sum[i][j], Floats) * factors[i], j, at + i * outputs);
}

typedef void (*Tile)(const Whole&, const Runs&, const uint8_t* const*, const float*, const int8_t*, const int32_t*,
                     const Outputs&, int64_t);
#if defined(__AVX512F__)
#define TILES(P) {tile<P, 1>, tile<P, 2>, tile<P, 3>, tile<P, 4>}
#else
#define TILES(P) {tile<P, 1>, tile<P, 2>}
#endif
static const Tile TILE[PIXELS][BLOCKS] = {TILES(1), TILES(2), TILES(3), TILES(4), TILES(5), TILES(6)};

// Blocks `from` to `to` of the outputs of each group. scales: of the pixels, or none.
static void dense(const Whole& a, const Image& b, const Buffer& in, const float* scales, int64_t rows, int64_t at,
                  int64_t from, int64_t to) {
  const int64_t per_group = a.outputs / a.groups, blocks = (per_group + W - 1) / W;
  const int64_t each = in_shorts(a) ? 2 : 1;  // bytes of an input
  const int64_t pixel = in.pixel * each, right = a.stride[1] * pixel, down = a.stride[0] * in.columns * pixel;
  const bool joined = a.groups == 1 && a.dilation[1] == 1;  // all pixels below a row of the kernel
  const int64_t used = joined ? a.kernel[1] * in.pixel : in.padded;
  const Runs runs{a.kernel[0], joined ? 1 : a.kernel[1], used, (used + 3) / 4 * 4 * each, a.dilation[0] * in.columns * pixel, a.dilation[1] * pixel};
  for (int64_t g = 0; g < a.groups; g++)
    for (int64_t block = from, wide; block < to; block += wide) {
      wide = part(to - block, BLOCKS);
      const int64_t index = g * blocks + block, channel = g * per_group + block * W;
      const int8_t* weight = a.at<int8_t>(a.weight) + index * runs.rows * runs.columns * runs.size * W;
      Bias bias;
      const Outputs out{b.y, a.at<float>(a.scale) + index * W, bias.of(a, b, channel, wide * W), per_group - block * W, b.out_kind};
      const uint8_t* row = in.data + g * in.padded * each;
      for (int64_t p = 0, x = 0, size; p < rows * b.out_width; p += size) {
        size = part(rows * b.out_width - p, PIXELS);
        const uint8_t* pixels[PIXELS];
        float factors[PIXELS];
        for (int64_t i = 0; i < size; i++) {
          factors[i] = scales ? scales[p + i] : 1;
          pixels[i] = row + x * right;
          if (++x == b.out_width) x = 0, row += down;
        }
        TILE[size - 1][wide - 1](a, runs, pixels, factors, weight, a.at<int32_t>(a.first) + index * W, out,
                                 (at + p) * a.outputs + channel);
      }
    }
}
#else
static void dense(const Whole&, const Image&, const Buffer&, const float*, int64_t, int64_t, int64_t, int64_t) {}
#endif

// ------------------------------------------------------------------------------------------------------ tasks

static int run(const Whole& a, Image b) {
  if (a.kernel[0] * a.kernel[1] * a.stride[0] * a.stride[1] == 1 && !b.top && !b.left && b.channels_last)  // a row of pixels
    b.height = b.out_height = b.count * b.height * b.width, b.count = b.width = b.out_width = 1;
  const bool deep = !a.depthwise;
  const int64_t unit = !deep ? 16 : a.groups == 1 && a.dilation[1] == 1 ? 1 : 4, groups = deep ? a.groups : 1;
  const int64_t group = a.channels / groups, padded = (group + unit - 1) / unit * unit;
  const int64_t reach = (a.kernel[0] - 1) * a.dilation[0] + 1;
  const int64_t columns = (b.out_width - 1) * a.stride[1] + (a.kernel[1] - 1) * a.dilation[1] + 1;
  const int64_t bytes = columns * groups * padded;
  int64_t rows = (CACHE / (in_shorts(a) ? 3 * bytes : bytes) - reach) / a.stride[0] + 1;  // of outputs, in a task
  rows = rows < 1 ? 1 : rows < b.out_height ? rows : b.out_height;
  int64_t chunks = (b.out_height + rows - 1) / rows, parts = 1, blocks = (a.outputs / a.groups + W - 1) / W;
  if (chunks * b.count < b.threads) {  // then several take the same inputs, or fewer rows
    if (deep && blocks > 1)
      parts = (b.threads + chunks * b.count - 1) / (chunks * b.count), parts = parts < blocks ? parts : blocks;
    else
      chunks = b.threads < b.out_height ? b.threads : b.out_height;
  }
  int bad = 0, failed = 0;
#pragma omp parallel for num_threads(b.threads) schedule(static) reduction(| : bad, failed) if (b.threads > 1)
  for (int64_t task = 0; task < b.count * chunks * parts; task++) {
    const int64_t n = task / parts / chunks, chunk = task / parts % chunks, part = task % parts;
    const int64_t first = b.out_height * chunk / chunks, last = b.out_height * (chunk + 1) / chunks;
    const int64_t needed = (last - first - 1) * a.stride[0] + reach;
    static thread_local Room room;
    const int64_t scales = a.tokens ? (4 * needed + 63) / 64 * 64 : 0;  // bytes
    const int64_t size = needed * bytes, behind = in_shorts(a) ? (size + 63) / 64 * 64 : 0;
    float* begin = (float*)room.of(scales + behind * 3 + size + 8);
    Buffer in{(uint8_t*)begin + scales, columns, groups * padded, group, padded, uint8_t(a.zero)};
    if (!begin) {
      failed = 1;
      continue;
    }
    const int64_t top = first * a.stride[0] - b.top, at = n * b.out_height * b.out_width + first * b.out_width;
    if (a.tokens)
      bad |= b.kind == BFLOAT16 ? in.read_rows<uint16_t>(a, b, top, needed, begin) : in.read_rows<float>(a, b, top, needed, begin);
    else
      bad |= b.kind == BFLOAT16 ? in.read<uint16_t>(a, b, n, top, needed) : in.read<float>(a, b, n, top, needed);
    if (behind) {
      uint16_t* shorts = (uint16_t*)(in.data + behind);
      for (int64_t i = 0; i < size; i++) shorts[i] = in.data[i];
      in.data = (uint8_t*)shorts;
    }
    if (deep)
      dense(a, b, in, a.tokens ? begin : nullptr, last - first, at, blocks * part / parts, blocks * (part + 1) / parts);
    else
      depthwise(a, b, in, last - first, at);
  }
  return failed ? 1 : bad ? 2 : 0;
}

extern "C" {

// Outputs in a block; 0 where `dense` does nothing.
int daq_block() {
#if ADDS_PRODUCTS || ADDS_PAIRS
  return W;
#else
  return 0;
#endif
}

// Whether `steps` counts.
int daq_pairs() {
#if ADDS_PAIRS
  return 1;
#else
  return 0;
#endif
}

// Returns 0, 1 where memory is short, 2 where an input is NaN (or infinite, where rows have scales): then outputs
// mean nothing, where rows have scales those of such rows, which are NaN.
int daq_whole(const Whole* a, const Image* b) { return run(*a, *b); }
}
