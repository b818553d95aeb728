// Rows of 8 bits for jacobian.cu: fetched as they lie in memory; correlations are products of integers, with inputs in fixed point,
// and for the sums multipliers make halves of the rows in their registers.

#include "hopper.cuh"
#include "eight_bit.cuh"

typedef unsigned char entry_t;
typedef unsigned short entries_t;     // two entries
typedef const unsigned char* rows_t;  // as a parameter
struct Source {
    const unsigned char *B, *A;
    const float *amult, *bmult;
    __device__ Source(const rows_t& B, const entry_t* A, const float* amult, const float* bmult) : B(B), A(A), amult(amult), bmult(bmult) {}
};

// A multiplier's thread reads words of a row, whose four entries are two lines of two tiles each; at the end of a row half words
// where a single tile takes what is left.
constexpr int UNIT = 2 * WIDTH, COLUMN_TILES = R / UNIT * 2 + (R % UNIT + WIDTH - 1) / WIDTH;
// A block in the ring: rows of B, which products read past the last column, rows of A, multipliers.
constexpr int A_AT = ROWS * R + UNIT, AMULT_AT = A_AT + ROWS * STRIDE_A, BMULT_AT = AMULT_AT + ROWS * 4;
constexpr int BLOCK = (BMULT_AT + ROWS * 4 + 127) / 128 * 128;
constexpr int FIRST_TILES = (COLUMN_TILES + 3) / 4 * 2, SECOND_TILES = COLUMN_TILES - FIRST_TILES;
static_assert(SECOND_TILES > 0 && R % 4 == 0, "too few columns, or words of rows that are none");
// Three warpgroups of 168 registers a thread when the program starts.
constexpr bool EVEN = FIRST_TILES == SECOND_TILES;
constexpr int MAKER_REGISTERS = EVEN ? 120 : 128, FIRST_REGISTERS = EVEN ? 192 : 208, SECOND_REGISTERS = EVEN ? 192 : 168;

struct Inputs {
    uint4 fixed[steps_of_32(R)][TILES][32];
    float unit[SAMPLES];
};
__device__ __forceinline__ void store(Inputs& inputs, const float* gbar, int samples) {
    store_fixed<R>(inputs.fixed, inputs.unit, gbar, samples);
}

// One thread: the rows in use of a block into their place in the ring, which nobody reads any more.
__device__ __forceinline__ void fetch(unsigned char* block, const Source& from, int first, int count, barrier_t* arrived) {
    const int rows = min(ROWS, count - first);
    unsigned char* const to[4] = {block, block + A_AT, block + AMULT_AT, block + BMULT_AT};
    const unsigned char* const parts[4] = {from.B + (long long)first * R, from.A + (long long)first * STRIDE_A,
                                           (const unsigned char*)&from.amult[first], (const unsigned char*)&from.bmult[first]};
    const int bytes[4] = {bytes_of<R, R>(rows), bytes_of<OUTPUTS, STRIDE_A>(rows), 4 * rows, 4 * rows};
    int whole = 0;
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        #pragma unroll 1
        for (int j = 0; j < bytes[i] % 16; j++) fetch_rest(to[i], parts[i], bytes[i], j);
        whole += bytes[i] & ~15;
    }
    arrive(arrived, whole);
    #pragma unroll
    for (int i = 0; i < 4; i++)
        if (bytes[i] > 15) fetch_bytes(to[i], parts[i], bytes[i] & ~15, arrived);
}

// Correlations of a thread's 2 rows, 8 apart, and 2 samples.
__device__ __forceinline__ void correlate(float (&q)[4], const unsigned char* block, const Inputs& inputs, const float (&norms)[2]) {
    const int lane = threadIdx.x % 32, turn = lane % 4;
    const unsigned char* rows = block + (16 * (threadIdx.x / 32 % 4) + lane / 4) * R + 4 * turn;
    int high[2][4] = {}, low[2][4] = {};  // products of every other step: each waits for the one before
    #pragma unroll
    for (int step = 0; step < steps_of_32(R); step++) {
        const uint4 input = inputs.fixed[step][0][lane];
        word_t words[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) words[i] = *(const word_t*)&rows[i % 2 * 8 * R + i / 2 * 16 + 32 * step];
        multiply_integers(high[step % 2], words[0], words[1], words[2], words[3], input.x, input.z);
        multiply_integers(low[step % 2], words[0], words[1], words[2], words[3], input.y, input.w);
    }
    #pragma unroll
    for (int i = 0; i < 4; i++)
        q[i] = from_fixed(high[0][i] + high[1][i], low[0][i] + low[1][i]) * (inputs.unit[2 * turn + i % 2] * norms[i / 2]);
}

// sums += rows^T weights, of OWN tiles from FIRST on.
template <int FIRST, int OWN, int SUMS>
__device__ __forceinline__ void multiply_block(float (&sums)[OWN][SUMS], const unsigned char* block, unsigned weights) {
    const int lane = threadIdx.x % 32, place = 8 * (threadIdx.x / 32 % 4) + lane / 4;
    const unsigned char* rows = block + 2 * (lane % 4) * R + WIDTH * FIRST;
    pair_t halves[2][2][4];  // of two units: products read one while the next is made
    #pragma unroll
    for (int k = 0; k < ROWS / 16; k++)
        #pragma unroll
        for (int t = 0; t < OWN; t += 2) {
            constexpr int UNITS = (OWN + 1) / 2;
            pair_t(&made)[2][4] = halves[(k * UNITS + t / 2) % 2];
            const bool whole = t + 1 < OWN;
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                const unsigned char* at = rows + (16 * k + 8 * j) * R + WIDTH * t + (whole ? 4 : 2) * place;
                if (whole) {
                    const word_t upper = *(const word_t*)at, lower = *(const word_t*)&at[R];
                    side_by_side<0>(upper, lower, made[0][2 * j], made[0][2 * j + 1]);
                    side_by_side<2>(upper, lower, made[1][2 * j], made[1][2 * j + 1]);
                } else {
                    side_by_side<0>(*(const entries_t*)at, *(const entries_t*)&at[R], made[0][2 * j], made[0][2 * j + 1]);
                }
            }
            const unsigned long long slice = matrix(slice_matrix(2 * SUMS), weights + k * slice_of(2 * SUMS));
            begin_products();
            multiply_registers(sums[t], made[0], slice);
            if (whole) multiply_registers(sums[whole ? t + 1 : t], made[1], slice);
            commit_products();
            wait_for_products<1>();
        }
}

// The column of the first (or second) of a thread's two lines of a tile.
__device__ __forceinline__ int column_of(int tile, int second) {
    const int place = 8 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
    const bool whole = tile / 2 * 2 + 1 < COLUMN_TILES;
    return tile / 2 * UNIT + (whole ? 4 * place + tile % 2 * 2 : 2 * place) + second;
}

// Halves of two entries, and twice that of entry i of two.
__device__ __forceinline__ pair_t both(entries_t entries) {
    return entries_less(__byte_perm(entries ^ 0x8080u, 0x64646464u, 0x4140));
}
__device__ __forceinline__ pair_t twice(entries_t entries, int i) {
    return entries_less(__byte_perm(entries ^ 0x8080u, 0x64646464u, i ? 0x4141 : 0x4040));
}

// The weights of all blocks, and the outputs. Of correlations, a thread has 2 rows of a block, 8 apart, and 2 samples of each.
// Entries of A are exact as halves; whatever else multiplies them is in F11, F00 and F02. Whatever stands beyond rows in use is
// finite, and zero times it is zero.
template <typename Memory>
__device__ __forceinline__ void make_blocks(Memory& memory, const Share& share, const Source&, int turns) {
    constexpr float SHRINK = 1.0f / 1024;  // outputs are in units as many times larger: bmult is about as small
    const int thread = threadIdx.x % LANES, warp = thread / 32, lane = thread % 32, own_row = 16 * warp + lane / 4;
    const int own_output = lane % 4 * 2;
    float outputs[2][4] = {}, unit = 0.0f, top = 0.0f;
    for (int turn = 0; turn < turns; turn++) {
        const int stage = turn % STAGES, buffer = turn % BUFFERS;
        const unsigned char* block = memory.ring[stage];
        wait(&memory.arrived[stage], turn / STAGES);
        float weights[2], norms[2], largest = 0.0f;
        entries_t rows[2][PAIRS], own[2];  // all outputs of a row, and two
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = own_row + 8 * h;
            const bool used = share.first + turn * share.step + row < share.count;
            weights[h] = used ? ((const float*)&block[AMULT_AT])[row] : 0.0f;
            norms[h] = used ? ((const float*)&block[BMULT_AT])[row] : 0.0f;
            largest = fmaxf(largest, fabsf(weights[h]) * norms[h]);
            const unsigned char* from = &block[A_AT + row * STRIDE_A];
            #pragma unroll
            for (int p = 0; p < PAIRS; p++) rows[h][p] = 2 * p + 1 < OUTPUTS ? *(const entries_t*)&from[2 * p] : from[2 * p];
            own[h] = own_output + 1 < OUTPUTS ? *(const entries_t*)&from[own_output] : own_output < OUTPUTS ? from[own_output] : 0;
        }
        #pragma unroll
        for (int shift = 16; shift >= 4; shift /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, shift));
        if (lane == 0) memory.largest[buffer][warp] = largest;

        float q[4];
        correlate(q, block, memory.gbar, norms);
        const float before = unit;
        wait_for_warpgroup(1);
        #pragma unroll
        for (int i = 0; i < 4; i++) largest = fmaxf(largest, memory.largest[buffer][i]);
        follow(largest, unit, top);
        const float inverse = inverse_power(unit);
        if (unit != before) {
            #pragma unroll
            for (int i = 0; i < 8; i++) outputs[i / 4][i % 4] *= before * inverse;
        }

        pair_t slopes[2], values[2][2], entries[4];
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            float F00[2], F11[2], F02[2];
            arc_cosine_kernels(q[2 * h], F00[0], F11[0], F02[0]);
            arc_cosine_kernels(q[2 * h + 1], F00[1], F11[1], F02[1]);
            const float scale = weights[h] * inverse, normed = scale * norms[h], shrunk = scale * SHRINK;
            slopes[h] = pack(F11[0] * normed, F11[1] * normed);
            values[0][h] = transposed(pack(F00[0] * shrunk, F00[1] * shrunk));
            values[1][h] = transposed(pack(F02[0] * shrunk, F02[1] * shrunk));
            const entries_t last = own_output == 0 && PAIRS > 4 ? rows[h][PAIRS - 1] : 0;  // outputs 8 and 9
            entries[2 * h] = transposed(both(own[h])), entries[2 * h + 1] = transposed(both(last));
        }
        #pragma unroll
        for (int k = 0; k < 2; k++) multiply_halves(outputs[k], entries, values[k][0], values[k][1]);

        if (turn >= BUFFERS) wait(&memory.used[(turn - BUFFERS) % STAGES], (turn - BUFFERS) / STAGES);
        #pragma unroll
        for (int h = 0; h < 2; h++)
            #pragma unroll
            for (int o = 0; o < 2 * PAIRS; o++)
                ((pair_t*)memory.weights[buffer][2 * warp + h][o])[lane] = product(slopes[h], twice(rows[h][o / 2], o % 2));
        if (thread == 0) memory.unit[buffer] = unit;
        show_to_products();
        release(&memory.made[buffer]);
    }
    #pragma unroll
    for (int k = 0; k < 2; k++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const int o = lane / 4 + i / 2 * 8, sample = lane % 4 * 2 + i % 2;
            if (o < OUTPUTS) memory.outputs[warp][sample][o][k] = outputs[k][i] * (unit / SHRINK);
        }
}
