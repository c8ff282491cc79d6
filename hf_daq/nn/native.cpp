// The dense stream of codes that bitpack.py describes, read as it is: a product with 1 to 8 rows of inputs, weights in
// float32 or bfloat16, and codes in bytes and back. And where the bounds of float weights start. native.py compiles and
// calls it.
//
// Work on codes is done in blocks of 64 columns. A block of B bits starts at any bit, is 8 * B bytes long, and is read as 64 bytes.

#include "vectors.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "codes lie in words of little endian"
#endif
#if defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define PICKS_FIELDS 1  // eight fields of a word at once
#endif
#if PICKS_FIELDS && defined(__AVX512BF16__)
#define MULTIPLIES_BFLOAT16 1  // two products of bfloat16 are added to a sum in float32
#endif
#if defined(__BMI2__) && !defined(__znver1__) && !defined(__znver2__)  // there it takes hundreds of cycles
#define SPREADS_BITS 1
#endif
constexpr int V = 64 / W;  // vectors in a block

#define INLINE_LAMBDA __attribute__((always_inline))

static INLINE Floats load(const float* p) { return load<Floats>(p); }

// ------------------------------------------------------------------------------------------- codes of a block

// The fields of 8 codes, each B bits of a word, to 8 bits each.
template <int B> static INLINE uint64_t spread(uint64_t w) {
#if SPREADS_BITS
  return _pdep_u64(w, 0x0101010101010101ull * ((1 << B) - 1));
#else
  constexpr uint64_t four = (1ull << (4 * B)) - 1, two = (1ull << (2 * B)) - 1, one = (1ull << B) - 1;
  w = (w & four) | ((w << (32 - 4 * B)) & (four << 32));
  w = (w & (two * 0x0000000100000001ull)) | ((w << (16 - 2 * B)) & (two * 0x0001000000010000ull));
  return (w & (one * 0x0001000100010001ull)) | ((w << (8 - B)) & (one * 0x0100010001000100ull));
#endif
}

template <int B> static INLINE uint64_t gather(uint64_t w) {
#if SPREADS_BITS
  return _pext_u64(w, 0x0101010101010101ull * ((1 << B) - 1));
#else
  constexpr uint64_t four = (1ull << (4 * B)) - 1, two = (1ull << (2 * B)) - 1, one = (1ull << B) - 1;
  w = (w & (one * 0x0001000100010001ull)) | ((w >> (8 - B)) & (one << B) * 0x0001000100010001ull);
  w = (w & (two * 0x0000000100000001ull)) | ((w >> (16 - 2 * B)) & (two << (2 * B)) * 0x0000000100000001ull);
  return (w & four) | ((w >> (32 - 4 * B)) & (B == 8 ? ~four : four << (4 * B % 64)));
#endif
}

template <int B> static INLINE void codes_of(const uint8_t* p, int shift, uint8_t* q) {
#if PICKS_FIELDS
  alignas(64) uint8_t words[64], fields[64];
  for (int i = 0; i < 64; i++) words[i] = i / 8 * B + i % 8, fields[i] = i % 8 * B;
  __m512i v = _mm512_permutexvar_epi8(_mm512_load_si512(words), _mm512_loadu_si512(p));
  v = _mm512_multishift_epi64_epi8(_mm512_load_si512(fields), _mm512_srl_epi64(v, _mm_cvtsi32_si128(shift)));
  _mm512_storeu_si512(q, _mm512_and_si512(v, _mm512_set1_epi8((1 << B) - 1)));
#else
  for (int i = 0; i < 8; i++) {
    uint64_t w;
    memcpy(&w, p + i * B, 8);
    w = spread<B>(w >> shift);
    memcpy(q + 8 * i, &w, 8);
  }
#endif
}

static INLINE Floats to_float(const uint8_t* q) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)q)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)q)));
#else
  float f[W];
  for (int i = 0; i < W; i++) f[i] = float(int(q[i]));
  return load(f);
#endif
}

// ----------------------------------------------------------- a block as floats code - zero, in the order of `lane`

template <int B> struct Decoder {
  typedef float Input;
  typedef Floats Vector;
  static constexpr int VECTORS = V;
#if PICKS_FIELDS
  static constexpr bool PAIRS = B < 8;  // a vector takes the fields 2j and 2j + 1 of each of the 8 words
  __m512i words, fields[4], mask, magic;
  __m512 table;
  float zero;

  INLINE Decoder(float zero) : zero(zero) {
    alignas(64) uint8_t w[64], f[4][64] = {};
    alignas(64) float t[16];
    for (int i = 0; i < 64; i++) w[i] = i / 8 * B + i % 8;
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 16; i++) f[j][4 * i] = ((2 * j + i % 2) * B - (B > 4)) & 63;
    for (int i = 0; i < 16; i++) t[i] = (i & ((1 << B) - 1)) - zero;
    words = _mm512_load_si512(w);
    for (int j = 0; j < 4; j++) fields[j] = _mm512_load_si512(f[j]);
    table = B > 4 ? _mm512_set1_ps(4194304.0f + zero) : _mm512_load_ps(t);
    mask = _mm512_set1_epi32(((1 << B) - 1) << 1);
    magic = _mm512_castps_si512(_mm512_set1_ps(4194304.0f));  // 2^22, whose last bit is a half
  }

  INLINE void operator()(const uint8_t* p, int shift, Floats* out) const {
    if constexpr (B == 8) {
      for (int j = 0; j < 4; j++) out[j] = to_float(p + 16 * j) - zero;
      return;
    }
    __m512i v = _mm512_permutexvar_epi8(words, _mm512_loadu_si512(p));
    v = _mm512_srl_epi64(v, _mm_cvtsi32_si128(shift));
    for (int j = 0; j < 4; j++) {
      __m512i field = _mm512_multishift_epi64_epi8(fields[j], v);
      if constexpr (B <= 4) {
        out[j] = (Floats)_mm512_permutexvar_ps(field, table);  // looks at 4 bits of the field
      } else {
        __m512i number = _mm512_ternarylogic_epi32(field, mask, magic, 0xEA);  // (field & mask) | magic
        out[j] = (Floats)_mm512_sub_ps(_mm512_castsi512_ps(number), table);
      }
    }
  }
#else
  static constexpr bool PAIRS = false;
  float zero;
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256 table;
  __m256i places;  // of 8 codes in 32 bits

  INLINE Decoder(float zero) : zero(zero) {
    float t[8];
    int32_t at[8];
    for (int i = 0; i < 8; i++) t[i] = (i & ((1 << B) - 1)) - zero, at[i] = i * B;
    table = _mm256_loadu_ps(t);
    places = _mm256_loadu_si256((const __m256i*)at);
  }
#endif
  INLINE void operator()(const uint8_t* p, int shift, Floats* out) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (B <= 3) {
      const __m256i from = _mm256_add_epi32(places, _mm256_set1_epi32(shift));
      for (int j = 0; j < 8; j++) {
        int32_t word;
        memcpy(&word, p + j * B, 4);
        out[j] = (Floats)_mm256_permutevar8x32_ps(table, _mm256_srlv_epi32(_mm256_set1_epi32(word), from));  // looks at 3 bits
      }
      return;
    }
#endif
    uint8_t q[64];
    codes_of<B>(p, shift, q);
    for (int j = 0; j < V; j++) out[j] = to_float(q + W * j) - zero;
  }
#endif
  static constexpr int lane(int c) { return PAIRS ? c % 8 / 2 * 16 + c / 8 * 2 + c % 2 : c; }
  static INLINE void add(Floats& sum, Vector w, const float* x) { sum += w * load(x); }
};

#if MULTIPLIES_BFLOAT16
// The same for inputs of bfloat16, in which these numbers are exact as well.
template <int B> struct HalfDecoder {
  typedef uint16_t Input;
  typedef __m512i Vector;
  static constexpr int VECTORS = 2;  // a vector takes the fields 4j to 4j + 3 of each of the 8 words
  __m512i words, fields[2], table;

  INLINE HalfDecoder(float zero) {
    alignas(64) uint8_t w[64], f[2][64] = {};
    alignas(64) uint16_t t[32];
    for (int i = 0; i < 64; i++) w[i] = i / 8 * B + i % 8;
    for (int j = 0; j < 2; j++)
      for (int i = 0; i < 32; i++) f[j][2 * i] = (4 * j + i % 4) * B;
    for (int i = 0; i < 32; i++) t[i] = number_to_bfloat16((i & ((1 << B) - 1)) - zero);
    words = _mm512_load_si512(w);
    for (int j = 0; j < 2; j++) fields[j] = _mm512_load_si512(f[j]);
    table = _mm512_load_si512(t);
  }

  INLINE void operator()(const uint8_t* p, int shift, Vector* out) const {
    __m512i v = _mm512_permutexvar_epi8(words, _mm512_loadu_si512(p));
    v = _mm512_srl_epi64(v, _mm_cvtsi32_si128(shift));
    for (int j = 0; j < 2; j++)  // looks at 5 bits of the field
      out[j] = _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(fields[j], v), table);
  }
  static constexpr int lane(int c) { return c % 8 / 4 * 32 + c / 8 * 4 + c % 4; }
  static INLINE void add(Floats& sum, Vector w, const uint16_t* x) {
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
};

// The same for two codes a byte, where groups start with a byte.
struct PairDecoder : HalfDecoder<4> {
  using HalfDecoder<4>::HalfDecoder;
  INLINE void operator()(const uint8_t* p, int, Vector* out) const {
    __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
    out[0] = _mm512_permutexvar_epi16(v, table);
    out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), table);
  }
  static constexpr int lane(int c) { return c % 2 * 32 + c / 2; }
};
#endif

// --------------------------------------------------------------------------------------------------- the layer

struct Layer {
  const uint8_t* codes;
  int64_t bytes;
  int bits;
  float zero;  // the code of a weight of 0, which may lie between two
  const float* scale;
  int64_t per_row, per_group;  // steps in scale
  int64_t rows, columns, group;
  uint8_t* tail = nullptr;  // a longer copy of the last rows: reading 64 bytes anywhere in them stays inside of it
  int64_t tail_row = 0, tail_start = 0;

  bool copy_tail() {
    for (tail_row = (bytes - 64) * 8 / (columns * bits); tail_row > 0 && end(tail_row - 1) > bytes; tail_row--) {}
    if (tail_row < 0) tail_row = 0;
    tail_start = tail_row * columns * bits / 8;
    tail = (uint8_t*)calloc(bytes - tail_start + 64, 1);
    if (tail) memcpy(tail, codes + tail_start, bytes - tail_start);
    return tail;
  }
  int64_t end(int64_t row) const { return (row + 1) * columns * bits / 8 + 64; }
  INLINE float step(const float* scale) const { return std::fabs(*scale) / zero; }
  // The byte in which a bit of this row lies.
  INLINE const uint8_t* at(int64_t row, int64_t bit) const {
    return row < tail_row ? codes + (bit >> 3) : tail + ((bit >> 3) - tail_start);
  }
};

static INLINE float sum_of(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);  // in the same order
#endif
  float parts[W];
  memcpy(parts, &v, sizeof parts);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

template <class To> static INLINE void convert(const void* x, int kind, int64_t from, int64_t size, To* block) {
  if (sizeof(To) == 2 || kind == FLOAT32)
    memcpy(block, (const To*)x + from, sizeof(To) * size);
  else
    for (int64_t i = 0; i < size; i++) block[i] = To(from_bfloat16(((const uint16_t*)x)[from + i]));
}

// `count` rows of inputs as blocks of M rows and 64 columns, in the order of the decoder. Groups are filled with zeros.
template <class Decode, int M>
static void arrange(const Layer& a, const void* x, int kind, int count, typename Decode::Input* out) {
  for (int64_t start = 0; start < a.columns; start += a.group) {
    int64_t stop = start + a.group < a.columns ? start + a.group : a.columns;
    for (int64_t c = start; c < stop; c += 64)
      for (int m = 0; m < M; m++, out += 64) {
        typename Decode::Input block[64] = {};
        if (m < count) convert(x, kind, m * a.columns + c, stop - c < 64 ? stop - c : 64, block);
        for (int i = 0; i < 64; i++) out[Decode::lane(i)] = block[i];
      }
  }
}

// M rows of inputs times one row of the weight.
template <int B, int M, class Decode>
static INLINE void product(const Layer& a, const Decode& decode, const typename Decode::Input* x, int64_t row,
                           float (&result)[M]) {
  constexpr int N = Decode::VECTORS;
  constexpr int A = M > 4 ? 1 : M > 1 || N < 4 ? 2 : 4;  // sums side by side: each addition waits for the one before
  Floats total[M] = {};
  const float* scale = a.scale + row * a.per_row;
  for (int64_t start = 0; start < a.columns; start += a.group, scale += a.per_group) {
    Floats sum[M][A] = {};
    int64_t size = a.columns - start < a.group ? a.columns - start : a.group, bit = (row * a.columns + start) * B;
    const uint8_t* p = a.at(row, bit);
    for (; size > 0; size -= 64, x += 64 * M, p += 8 * B) {
      typename Decode::Vector w[N];
      __builtin_prefetch(p + 2048);
      decode(p, int(bit & 7), w);
      for (int v = 0; v < N; v++)
        for (int m = 0; m < M; m++) Decode::add(sum[m][v % A], w[v], x + 64 * m + 64 / N * v);
    }
    float absolute = std::fabs(*scale);
    for (int m = 0; m < M; m++) {
      for (int i = 1; i < A; i++) sum[m][0] += sum[m][i];
      total[m] += sum[m][0] * absolute;
    }
  }
  for (int m = 0; m < M; m++) result[m] = sum_of(total[m]) / a.zero;
}

struct Output {
  void* y;
  const void* bias;
  int kind;
  INLINE void put(int64_t at, int64_t row, float value) const {
    if (kind == BFLOAT16) {
      if (bias) value += from_bfloat16(((const uint16_t*)bias)[row]);
      ((uint16_t*)y)[at] = to_bfloat16(value);
    } else {
      if (bias) value += ((const float*)bias)[row];
      ((float*)y)[at] = value;
    }
  }
};

template <int B, int M, class Decode>
static void few(const Layer& a, const void* x, int count, const Output& out, void* room, int threads) {
  auto arranged = (typename Decode::Input*)room;
  arrange<Decode, M>(a, x, out.kind, count, arranged);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; part++) {
    Decode decode{a.zero};
    for (int64_t row = a.rows * part / threads; row < a.rows * (part + 1) / threads; row++) {
      float result[M];
      product<B, M>(a, decode, arranged, row, result);
      for (int m = 0; m < count; m++) out.put(m * a.rows + row, row, result[m]);
    }
  }
}

template <int B, class Decode>
static void linear(const Layer& a, const void* x, int64_t count, Output out, void* room, int threads) {
  int64_t size = out.kind == BFLOAT16 ? 2 : 4;
  for (int64_t done = 0, rows; done < count; done += rows) {
    rows = count - done < 8 ? count - done : 8;
    (rows > 4 ? few<B, 8, Decode> : rows > 2 ? few<B, 4, Decode> : rows == 2 ? few<B, 2, Decode> : few<B, 1, Decode>)(
        a, (const char*)x + done * a.columns * size, int(rows), out, room, threads);
    out.y = (char*)out.y + rows * a.rows * size;
  }
}

template <int B> static void linear(const Layer& a, const void* x, int64_t count, Output out, void* room, int threads) {
#if MULTIPLIES_BFLOAT16
  if constexpr (B == 4)
    if (out.kind == BFLOAT16 && a.columns % 2 == 0 && a.group % 2 == 0)
      return linear<B, PairDecoder>(a, x, count, out, room, threads);
  if constexpr (B <= 5)
    if (out.kind == BFLOAT16) return linear<B, HalfDecoder<B>>(a, x, count, out, room, threads);
#endif
  linear<B, Decoder<B>>(a, x, count, out, room, threads);
}

template <int B> static void weights(const Layer& a, int64_t first, int64_t last, void* out, int kind, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t row = first; row < last; row++)
    for (int64_t k = 0, start = 0; start < a.columns; k++, start += a.group) {
      int64_t stop = start + a.group < a.columns ? start + a.group : a.columns, bit = (row * a.columns + start) * B;
      float step = a.step(a.scale + row * a.per_row + k * a.per_group);
      for (int64_t c = start; c < stop; c += 64, bit += 64 * B) {
        alignas(64) uint8_t q[64];
        codes_of<B>(a.at(row, bit), int(bit & 7), q);
        float value[64];
        uint16_t half[64];
        for (int i = 0; i < 64; i++) value[i] = (float(int(q[i])) - a.zero) * step;
        int64_t at = (row - first) * a.columns + c, size = stop - c < 64 ? stop - c : 64;
        if (kind == BFLOAT16) {
          for (int i = 0; i < 64; i++) half[i] = step == step ? number_to_bfloat16(value[i]) : 0x7FC0;
          memcpy((uint16_t*)out + at, half, 2 * size);
        } else {
          memcpy((float*)out + at, value, 4 * size);
        }
      }
    }
}

template <int B> static void read_codes(const uint8_t* p, int64_t bytes, uint8_t* out, int64_t count) {
  const uint8_t* end = p + bytes;
  for (int64_t i = 0; i < count; i += 64, p += 8 * B) {
    alignas(64) uint8_t copy[64] = {}, q[64];
    if (p + 64 > end) memcpy(copy, p, end - p);
    codes_of<B>(p + 64 > end ? copy : p, 0, q);
    memcpy(out + i, q, count - i < 64 ? count - i : 64);
  }
}

template <int B> static void write_codes(const uint8_t* q, uint8_t* out, int64_t count) {
  for (int64_t i = 0; i < count; i += 64) {
    int64_t size = count - i < 64 ? count - i : 64;
    uint8_t block[64] = {}, bytes[64 + 8];
    memcpy(block, q + i, size);
    for (int j = 0; j < 8; j++) {
      uint64_t w;
      memcpy(&w, block + 8 * j, 8);
      w = gather<B>(w);
      memcpy(bytes + j * B, &w, 8);
    }
    memcpy(out + i / 8 * B, bytes, (size * B + 7) / 8);
  }
}

// ------------------------------------------------------------------------------------------ where bounds start

typedef int32_t Ints __attribute__((vector_size(4 * W)));

// levels: the last code. center: the code of 0.
struct Grid {
  float levels, center;
};

// Of residuals r at the step of the bounds, and of centered codes k: from these follow the error and the step of least squares.
struct Sums {
  double rr = 0, rk = 0, kk = 0, k = 0;
};

template <class F> static INLINE float folded(Floats v, F f) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[W / 4];
  memcpy(parts, &v, sizeof v);
  for (int i = 1; i < W / 4; i++) parts[0] = f(parts[0], parts[i]);
  return f(f(parts[0][0], parts[0][2]), f(parts[0][1], parts[0][3]));
}

static INLINE float total(Floats v) {
  return folded(v, [](auto a, auto b) INLINE_LAMBDA { return a + b; });
}

constexpr int PIECE = 4096, CANDIDATES = 64, COARSE = 8;

// The weights under one pair of bounds.
struct Row {
  const void* data;
  int kind;
  int64_t size;
  float offset;
  alignas(64) float x[PIECE];  // a piece of them less the offset, filled with zeros to a whole vector
  int64_t held;

  int piece(int64_t start) {
    int count = int(size - start < PIECE ? size - start : PIECE);
    if (held != start) {
      if (kind == BFLOAT16)
        for (int i = 0; i < count; i++) x[i] = from_bfloat16(((const uint16_t*)data)[start + i]) - offset;
      else
        for (int i = 0; i < count; i++) x[i] = ((const float*)data)[start + i] - offset;
      for (int i = count; i % W; i++) x[i] = 0;
      held = start;
    }
    return count;
  }

  // The magnitude of the lower bound that clips nothing.
  float outermost(Grid grid) {
    auto smaller = [](auto a, auto b) INLINE_LAMBDA { return a < b ? a : b; };
    auto larger = [](auto a, auto b) INLINE_LAMBDA { return a > b ? a : b; };
    Floats least = {}, most = {};
    for (int64_t start = 0; start < size; start += PIECE) {
      int count = piece(start);
      for (int i = 0; i < count; i += W) {
        Floats v = load(x + i);
        least = smaller(v, least), most = larger(v, most);
      }
    }
    return larger(-folded(least, smaller), folded(most, larger) * (grid.center / (grid.levels - grid.center)));
  }

  template <bool CODES> INLINE Sums sums(Grid grid, float bound) {
    const float step = bound / grid.center, per_step = 1 / step, top = grid.levels - grid.center;
    const Floats first = Floats{} + 0.5f, last = first + grid.levels;
    Sums all;
    for (int64_t start = 0; start < size; start += PIECE) {
      int count = piece(start), whole = count / W * W, i = 0;
      Floats rr[2] = {}, rk[2] = {}, kk[2] = {}, sum[2] = {};
      auto add = [&](int i, int j, Floats mask) INLINE_LAMBDA {
        Floats v = load(x + i), p = top + 0.5f - v * per_step;  // from the upper bound down: then ties go to the lower code
        p = p < first ? first : p;
        p = p > last ? last : p;
        Floats k = top - __builtin_convertvector(__builtin_convertvector(p, Ints), Floats), r = v - k * step;
        k *= mask;
        rr[j] += r * r * mask, rk[j] += r * k, kk[j] += k * k;
        if (CODES) sum[j] += k;
      };
      const Floats one = Floats{} + 1.0f;
      for (; i + 2 * W <= whole; i += 2 * W) add(i, 0, one), add(i + W, 1, one);
      if (i < whole) add(i, 0, one), i += W;
      if (i < count) {
        float mask[W];
        for (int n = 0; n < W; n++) mask[n] = i + n < count;
        add(i, 1, load(mask));
      }
      all.rr += total(rr[0] + rr[1]), all.rk += total(rk[0] + rk[1]), all.kk += total(kk[0] + kk[1]);
      if (CODES) all.k += total(sum[0] + sum[1]);
    }
    return all;
  }
};

// The candidates, as shares of the widest.
static const struct Shares {
  float of[CANDIDATES];
  Shares() {
    for (int i = 0; i < CANDIDATES; i++) of[i] = std::pow(10.0f, -1.5f * i / (CANDIDATES - 1));
  }
} SHARES;

// The widest of the candidates whose squared error is within the tolerance of the smallest, as search.py says.
struct Search {
  Row& row;
  Grid grid;
  float largest;
  double noise, errors[CANDIDATES], rk[CANDIDATES], kk[CANDIDATES];
  uint64_t tried = 0;

  bool known(int i) const { return tried >> i & 1; }

  // Of these candidates, those that are there and were not tried. Nothing looks at an error before all are there, or the next
  // candidate would wait for it.
  __attribute__((noinline)) void attempt(int from, int to, int stride) {
    for (int i = from; i < to; i += stride) {
      if (i < 0 || i >= CANDIDATES || known(i)) continue;
      Sums s = row.sums<false>(grid, SHARES.of[i] * largest);
      double left = s.kk > 0 ? s.rr - s.rk * s.rk / s.kk : s.rr;
      errors[i] = left > 0 ? left : 0, rk[i] = s.rk, kk[i] = s.kk, tried |= 1ull << i;
    }
  }

  // Of those that were tried: the first of the best, and the first within the limit.
  int best() const {
    int at = 0;
    for (uint64_t left = tried; left; left &= left - 1) {
      int i = __builtin_ctzll(left);
      at = errors[i] < errors[at] ? i : at;
    }
    return at;
  }

  int first(double limit) const {
    uint64_t left = tried;
    while (errors[__builtin_ctzll(left)] > limit) left &= left - 1;
    return __builtin_ctzll(left);
  }

  int widest(float lowest, float tolerance) {
    int last = int(std::ceil(std::log10(largest / lowest) * ((CANDIDATES - 1) / 1.5f)));
    last = last < 2 ? 2 : last < CANDIDATES ? last : CANDIDATES - 1;
    int stride = (last + COARSE - 2) / (COARSE - 1);
    attempt(0, last + 1, stride);
    for (int i = last / stride * stride; i < CANDIDATES && best() == i; attempt(i, i + 1, stride)) i += stride;
    int center = best();
    attempt(center - stride + 1, center + stride, 1);
    double limit = errors[best()] * (1 + tolerance) + noise;
    int end = first(limit), before = end - 1;
    while (before > 0 && !known(before)) before--;
    attempt(before + 1, end, 1);
    return first(limit);
  }
};

// ------------------------------------------------------------------------------------ called through ctypes

#define FOR_BITS(CALL)                                                            \
  switch (bits) {                                                                 \
    case 1: CALL(1); break; case 2: CALL(2); break; case 3: CALL(3); break;       \
    case 4: CALL(4); break; case 5: CALL(5); break; case 6: CALL(6); break;       \
    case 7: CALL(7); break; case 8: CALL(8); break;                               \
    default: return 1;                                                            \
  }

extern "C" {

// x: (count, columns); y: (count, rows); both, and the bias, of this kind. Returns 0, or 1 where memory is short.
int daq_linear(const uint8_t* codes, int64_t bytes, int bits, float zero, const float* scale, int64_t per_row,
               int64_t per_group, int64_t rows, int64_t columns, int64_t group, const void* x, int64_t count,
               const void* bias, void* y, int kind, int threads) {
  Layer a{codes, bytes, bits, zero, scale, per_row, per_group, rows, columns, group};
  int64_t blocks = columns / group * ((group + 63) / 64) + (columns % group + 63) / 64;
  void* room = malloc(blocks * 64 * (count > 4 ? 8 : 4) * sizeof(float));
  if (!room || !a.copy_tail()) return free(room), 1;
#define CALL(B) linear<B>(a, x, count, Output{y, bias, kind}, room, threads)
  FOR_BITS(CALL)
#undef CALL
  free(a.tail);
  free(room);
  return 0;
}

// Rows `first` to `last` of the weight, |scale| * (code - zero) / zero: out has the shape (last - first, columns).
int daq_weights(const uint8_t* codes, int64_t bytes, int bits, float zero, const float* scale, int64_t per_row,
                int64_t per_group, int64_t columns, int64_t group, int64_t first, int64_t last, void* out, int kind,
                int threads) {
  Layer a{codes, bytes, bits, zero, scale, per_row, per_group, last, columns, group};
  if (!a.copy_tail()) return 1;
#define CALL(B) weights<B>(a, first, last, out, kind, threads)
  FOR_BITS(CALL)
#undef CALL
  free(a.tail);
  return 0;
}

int daq_read_codes(const uint8_t* stream, int64_t bytes, int bits, uint8_t* codes, int64_t count) {
#define CALL(B) read_codes<B>(stream, bytes, codes, count)
  FOR_BITS(CALL)
#undef CALL
  return 0;
}

int daq_write_codes(const uint8_t* codes, int bits, uint8_t* stream, int64_t count) {
#define CALL(B) write_codes<B>(codes, stream, count)
  FOR_BITS(CALL)
#undef CALL
  return 0;
}

// For each row of `size` weights, of which the last in each `groups` has `missing` less, the lower bound in units, and the
// scale of least squares. bounds: of each row, or 0 where it is to be searched; not below `lowest`, if the error grows there.
int daq_start(const void* weights, int kind, int64_t rows, int64_t size, int64_t groups, int64_t missing,
              const float* offsets, const float* units, float levels, float center, float lowest, float tolerance,
              float noise, float* bounds, float* scales, int threads) {
  const Grid grid{levels, center};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    Row row;
    row.data = (const char*)weights + i * size * (kind == BFLOAT16 ? 2 : 4);
    row.kind = kind, row.offset = offsets[i], row.held = -1;
    row.size = i % groups == groups - 1 ? size - missing : size;
    const float unit = units[i];
    float bound = bounds[i] * unit;
    Sums s;
    if (bounds[i] > 0) {
      s = row.sums<true>(grid, bound);
    } else {
      float largest = row.outermost(grid);
      largest = largest > 1e-3f * unit ? largest : 1e-3f * unit;
      Search search{row, grid, largest, noise * double(unit) * unit * row.size};
      int found = levels > 1 && std::isfinite(unit) ? search.widest(lowest * unit, tolerance) : 0;
      bound = SHARES.of[found] * largest;
      bounds[i] = bound / unit;
      if (search.known(found) && row.offset == 0) s.rk = search.rk[found], s.kk = search.kk[found];
      else s = row.sums<true>(grid, bound);
    }
    double step = s.kk > 0 ? (s.rk + double(bound) / center * s.kk + row.offset * s.k) / s.kk : 0;
    scales[i] = float(step * center);
    if (!std::isfinite(unit) || !std::isfinite(step)) bounds[i] = scales[i] = NAN;
  }
  return 0;
}
}
