// What the kernels on rows of 8 bits share: blocks of rows as they lie in memory, products with them, inputs in fixed point.
//
// A warp multiplies 16 x 8 x 32 integers or 16 x 8 x 16 halves in one instruction. What a thread holds of the matrices there
// follows from place = lane / 4 and turn = lane % 4.

#include "device.cuh"

typedef unsigned int word_t;  // four entries of a row

__device__ constexpr int steps_of_32(int columns) { return (columns + 31) / 32; }  // products of 32 columns
constexpr int TILES = SAMPLES / 8;

// From global to shared memory, both at multiples of 16 bytes, as is the number of bytes.
__device__ __forceinline__ void fetch_bytes(void* to, const void* from, int bytes, barrier_t* arrived) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(arrived))
                 : "memory");
}
// Bytes of ``count`` rows that stand STRIDE bytes apart, what stands behind the last of them left out.
template <int COLUMNS, int STRIDE>
__device__ __forceinline__ int bytes_of(int count) { return (count - 1) * STRIDE + COLUMNS; }
// Bytes that fetch_bytes leaves, fewer than 16: byte i of them by whoever asks.
__device__ __forceinline__ void fetch_rest(unsigned char* to, const unsigned char* from, int bytes, int i) {
    const int at = (bytes & ~15) + i;
    if (at < bytes) to[at] = from[at];
}

// sums [16, 8] += a [16, 32] b [32, 8]. a: entries 4 turn, .. + 3 of lines place and place + 8, then entries 16 on; b likewise.
// sums: entries 2 turn, + 1 of line place, then of line place + 8.
__device__ __forceinline__ void multiply_integers(int (&sums)[4], word_t a0, word_t a1, word_t a2, word_t a3, word_t b0, word_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// sums [16, 8] += a [16, 16] b [16, 8], pairs in the place of fours.
__device__ __forceinline__ void multiply_halves(float (&sums)[4], const pair_t (&a)[4], pair_t b0, pair_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An entry plus 128 is the end of the half 1024 + 128 + entry: two entries of halves that are so much more.
__device__ __forceinline__ pair_t entries_less(pair_t more) {
    asm("sub.f16x2 %0, %0, %1;" : "+r"(more) : "r"(0x64806480u));
    return more;
}
// Entries of two rows become halves, side by side: those of columns FIRST and FIRST + 1 of their words, as pairs of rows.
template <int FIRST>
__device__ __forceinline__ void side_by_side(word_t upper, word_t lower, pair_t& left, pair_t& right) {
    const word_t both = __byte_perm(upper, lower, FIRST ? 0x7362 : 0x5140) ^ 0x80808080u;
    left = entries_less(__byte_perm(both, 0x64646464u, 0x4140)), right = entries_less(__byte_perm(both, 0x64646464u, 0x4342));
}
__device__ __forceinline__ pair_t product(pair_t a, pair_t b) {
    asm("mul.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
}
// Of a matrix of 8 x 8 halves, of which threads have entries 2 turn, + 1 of line place, the transposed.
__device__ __forceinline__ pair_t transposed(pair_t entries) {
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(entries));
    return entries;
}

// Inputs [SAMPLES, COLUMNS] in fixed point of 16 bits: entry = unit (high + low / FINER), high and low integers of 8 bits. Zero
// beyond samples. What is not finite makes the sample's unit NaN. All threads of the program; nobody has read before the next
// barrier. A word each of high, low, and of both 16 columns on, as multiply_integers takes them.
constexpr float FINER = 254.0f;
template <int COLUMNS>
__device__ __forceinline__ void store_fixed(uint4 (*to)[TILES][32], float* unit, const float* from, int samples) {
    for (int sample = threadIdx.x / 32; sample < SAMPLES; sample += blockDim.x / 32) {
        float largest = 0.0f, not_finite = 0.0f;
        for (int column = threadIdx.x % 32; column < COLUMNS && sample < samples; column += 32) {
            const float x = from[(long long)sample * COLUMNS + column];
            largest = fmaxf(largest, fabsf(x)), not_finite += 0.0f * x;
        }
        for (int shift = 16; shift; shift /= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, shift));
            not_finite += __shfl_xor_sync(~0u, not_finite, shift);
        }
        if (threadIdx.x % 32 == 0) unit[sample] = fmaxf(largest, 1e-35f) / 127.0f + not_finite;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < steps_of_32(COLUMNS) * TILES * 32; i += blockDim.x) {
        const int lane = i % 32, sample = i / 32 % TILES * 8 + lane / 4, first = i / 32 / TILES * 32 + lane % 4 * 4;
        const float inverse = 1.0f / unit[sample];
        word_t words[4] = {};
        for (int j = 0; j < 8; j++) {
            const int column = first + j / 4 * 16 + j % 4;
            const float x = sample < samples && column < COLUMNS ? from[(long long)sample * COLUMNS + column] * inverse : 0.0f;
            const float high = rintf(x), low = rintf((x - high) * FINER);
            words[j / 4 * 2] |= ((int)high & 255) << j % 4 * 8, words[j / 4 * 2 + 1] |= ((int)low & 255) << j % 4 * 8;
        }
        to[i / 32 / TILES][i / 32 % TILES][lane] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}
__device__ __forceinline__ float from_fixed(int high, int low) { return (float)high + (float)low * (1.0f / FINER); }
