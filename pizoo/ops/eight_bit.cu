// The growing layer's forward and backward on rows of 8 bits, for few samples, for NVIDIA GPUs of compute capability 9.0.
//
// Computes what pizoo.ops.reference says, over this program's rows, with q = gbar (bmult B)^T clamped to [-1, 1]:
//     forward:  partial[program, b, :OUTPUTS] = sum_m F00(q_bm) amult_m A_m
//     backward: partial[program, b, :R] = sum_m c_bm F11(q_bm) bmult_m B_m and [.., R] = sum_m c_bm F02(q_bm),
//               c = (delta A^T) amult
//
// Every warp works by itself: it fetches blocks of 16 rows into a ring of its own, as they lie in memory, and keeps all sums,
// SAMPLES x columns, in its registers. Correlations (and gradients) are products of integers, of the rows with inputs in fixed
// point: high parts stand as 8 lines over low parts, so that a thread has both of its own sample, 8 rows. These become
// coefficients, which are the other factor of the second product just where they stand; the rows become halves in registers.
//
// Coefficients of a block are divided by a power of two near the largest, and sums are kept in that unit. Gradients at the output
// are in units of their sample. No atomics, fixed order: two runs give the same bits.
//
// Given by the compiler's command line: R, OUTPUTS, STRIDE_A and STRIDE_B (bytes between rows, multiples of 4), SAMPLES (8 or 16),
// BACKWARD, STAGES, LINE (floats between samples of partial), SHARED (bytes of shared memory a program gets), BFLOAT16 (0).

#include "eight_bit.cuh"

constexpr int WARPS = 8, ROWS = 16;
constexpr int SUMMED = BACKWARD ? R : OUTPUTS, GROUPS = (SUMMED + 31) / 32;  // columns of the result, of which 32 are a group

struct Stage {
    alignas(16) unsigned char B[ROWS * STRIDE_B + 32], A[ROWS * STRIDE_A + 32];  // products read past the last columns
};
struct Memory {
    Stage ring[WARPS][STAGES];
    alignas(16) uint4 gbar[steps_of_32(R)][TILES][32], delta[BACKWARD ? steps_of_32(OUTPUTS) : 1][TILES][32];
    float gbar_unit[SAMPLES], delta_unit[SAMPLES], along[WARPS][SAMPLES];
    barrier_t arrived[WARPS][STAGES];
};
static_assert(sizeof(Memory) <= SHARED, "the rings do not fit shared memory");
static_assert(sizeof(float[WARPS][SAMPLES][SUMMED]) <= sizeof(Memory::ring), "the sums do not fit the rings");
static_assert(STAGES > 1 && STRIDE_A % 4 == 0 && STRIDE_B % 4 == 0, "one stage, or words of rows that are none");

// A warp: the rows in use of a block into a stage that it has read.
__device__ __forceinline__ void fetch(Stage& stage, const unsigned char* A, const unsigned char* B, int first, int count, barrier_t* arrived) {
    if (first >= count) return;
    const int lane = threadIdx.x % 32, rows = min(ROWS, count - first);
    const int bytes_A = bytes_of<OUTPUTS, STRIDE_A>(rows), bytes_B = bytes_of<R, STRIDE_B>(rows);
    A += (long long)first * STRIDE_A, B += (long long)first * STRIDE_B;
    if (lane == 0) {
        arrive(arrived, (bytes_A & ~15) + (bytes_B & ~15));
        if (bytes_B > 15) fetch_bytes(stage.B, B, bytes_B & ~15, arrived);
        if (bytes_A > 15) fetch_bytes(stage.A, A, bytes_A & ~15, arrived);
    }
    fetch_rest(stage.B, B, bytes_B, lane), fetch_rest(stage.A, A, bytes_A, lane);
}

// sums += inputs rows^T: high parts and low parts of sample 8 tile + place with rows 8 j + 2 turn, + 1.
template <int COLUMNS, int STRIDE>
__device__ __forceinline__ void contract(int (&sums)[2][TILES][4], const unsigned char* rows, const uint4 (*inputs)[TILES][32]) {
    const int lane = threadIdx.x % 32;
    rows += lane / 4 * STRIDE + lane % 4 * 4;
    #pragma unroll
    for (int step = 0; step < steps_of_32(COLUMNS); step++) {
        word_t words[2][2];
        #pragma unroll
        for (int j = 0; j < 2; j++)
            #pragma unroll
            for (int h = 0; h < 2; h++) words[j][h] = *(const word_t*)&rows[8 * j * STRIDE + 32 * step + 16 * h];
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const uint4 input = inputs[step][tile][lane];
            #pragma unroll
            for (int j = 0; j < 2; j++)
                multiply_integers(sums[j][tile], input.x, input.y, input.z, input.w, words[j][0], words[j][1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
growing_layer(const float* __restrict__ gbar, const float* __restrict__ delta, const unsigned char* __restrict__ A,
              const unsigned char* __restrict__ B, const float* __restrict__ amult, const float* __restrict__ bmult,
              const long long* __restrict__ rows_in_use, float* __restrict__ partial, int M, int b) {
    extern __shared__ __align__(1024) unsigned char bytes[];
    Memory& memory = *(Memory*)bytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = lane / 4, turn = lane % 4;
    const int first_sample = SAMPLES * blockIdx.y, samples = samples_of(b);
    const int count = rows_in_use ? (int)min(*rows_in_use, (long long)M) : M, step = gridDim.x * WARPS * ROWS;
    if ((int)blockIdx.x * WARPS * ROWS >= count) return;
    int first = (blockIdx.x * WARPS + warp) * ROWS;

    barrier_t* arrived = memory.arrived[warp];
    if (lane == 0) {
        for (int stage = 0; stage < STAGES; stage++) expect(&arrived[stage], 1);
        show_to_products();
    }
    __syncwarp();
    for (int stage = 0; stage < STAGES; stage++) fetch(memory.ring[warp][stage], A, B, first + stage * step, count, &arrived[stage]);

    // Multipliers of rows 8 j + 2 turn + i, loaded a block ahead.
    float weights[2][2], norms[2][2];
    auto fetch_multipliers = [&](int first) {
        #pragma unroll
        for (int j = 0; j < 2; j++)
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = first + 8 * j + 2 * turn + i;
                weights[j][i] = row < count ? amult[row] : 0.0f, norms[j][i] = row < count ? bmult[row] : 0.0f;
            }
    };
    fetch_multipliers(first);
    store_fixed<R>(memory.gbar, memory.gbar_unit, gbar + (long long)first_sample * R, samples);
    if (BACKWARD) store_fixed<OUTPUTS>(memory.delta, memory.delta_unit, delta + (long long)first_sample * OUTPUTS, samples);
    __syncthreads();

    float sums[GROUPS][2][TILES][4] = {}, along[TILES] = {}, gbar_unit[TILES], unit = 0.0f, top = 0.0f;
    #pragma unroll
    for (int tile = 0; tile < TILES; tile++) gbar_unit[tile] = memory.gbar_unit[8 * tile + place];
    int at = 0, phase = 0;
    for (; first < count; first += step) {
        Stage& stage = memory.ring[warp][at];
        wait(&arrived[at], phase);
        int q[2][TILES][4] = {}, gradients[2][TILES][4] = {};
        if (BACKWARD) contract<OUTPUTS, STRIDE_A>(gradients, stage.A, memory.delta);
        contract<R, STRIDE_B>(q, stage.B, memory.gbar);

        float coefficients[2][TILES][2], largest = 0.0f;
        #pragma unroll
        for (int j = 0; j < 2; j++)
            #pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    float F00, F11, F02;
                    arc_cosine_kernels(from_fixed(q[j][tile][i], q[j][tile][2 + i]) * (gbar_unit[tile] * norms[j][i]), F00, F11, F02);
                    if (BACKWARD) {
                        const float gradient = from_fixed(gradients[j][tile][i], gradients[j][tile][2 + i]) * weights[j][i];
                        along[tile] += gradient * F02;
                        coefficients[j][tile][i] = gradient * F11 * norms[j][i];
                    } else {
                        coefficients[j][tile][i] = F00 * weights[j][i];
                    }
                    largest = fmaxf(largest, fabsf(coefficients[j][tile][i]));
                }
        fetch_multipliers(first + step);
        #pragma unroll
        for (int shift = 16; shift; shift /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, shift));
        const float before = unit;
        follow(largest, unit, top);
        const float inverse = inverse_power(unit);
        if (unit != before) {
            #pragma unroll
            for (int i = 0; i < GROUPS * 2 * TILES * 4; i++) (&sums[0][0][0][0])[i] *= before * inverse;
        }
        pair_t pairs[TILES][2];
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            #pragma unroll
            for (int j = 0; j < 2; j++) pairs[tile][j] = pack(coefficients[j][tile][0] * inverse, coefficients[j][tile][1] * inverse);

        // Columns 4 place + 2 half, + 1 of a group are lines place and place + 8 of a product.
        constexpr int STRIDE = BACKWARD ? STRIDE_B : STRIDE_A;
        const unsigned char* rows = (BACKWARD ? stage.B : stage.A) + 2 * turn * STRIDE + 4 * place;
        #pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            word_t words[2][2];
            #pragma unroll
            for (int j = 0; j < 2; j++)
                #pragma unroll
                for (int i = 0; i < 2; i++) words[j][i] = *(const word_t*)&rows[(8 * j + i) * STRIDE + 32 * group];
            pair_t halves[2][4];
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                side_by_side<0>(words[j][0], words[j][1], halves[0][2 * j], halves[0][2 * j + 1]);
                side_by_side<2>(words[j][0], words[j][1], halves[1][2 * j], halves[1][2 * j + 1]);
            }
            #pragma unroll
            for (int half = 0; half < 2; half++)
                #pragma unroll
                for (int tile = 0; tile < TILES; tile++)
                    multiply_halves(sums[group][half][tile], halves[half], pairs[tile][0], pairs[tile][1]);
        }
        __syncwarp();
        fetch(stage, A, B, first + STAGES * step, count, &arrived[at]);
        if (++at == STAGES) at = 0, phase ^= 1;
    }
    __syncthreads();

    float(*shares)[SAMPLES][SUMMED] = (float(*)[SAMPLES][SUMMED])memory.ring;
    #pragma unroll
    for (int group = 0; group < GROUPS; group++)
        #pragma unroll
        for (int half = 0; half < 2; half++)
            #pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = 32 * group + 4 * place + 2 * half + i / 2, sample = 8 * tile + 2 * turn + i % 2;
                    if (column < SUMMED) shares[warp][sample][column] = sums[group][half][tile][i] * unit;
                }
    if (BACKWARD) {
        #pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            along[tile] += __shfl_xor_sync(~0u, along[tile], 1);
            along[tile] += __shfl_xor_sync(~0u, along[tile], 2);
            if (turn == 0) memory.along[warp][8 * tile + place] = along[tile];
        }
    }
    __syncthreads();
    partial += ((long long)blockIdx.x * b + first_sample) * LINE;
    for (int i = threadIdx.x; i < samples * SUMMED; i += blockDim.x) {
        float sum = 0.0f;
        for (int j = 0; j < WARPS; j++) sum += shares[j][i / SUMMED][i % SUMMED];
        partial[(long long)(i / SUMMED) * LINE + i % SUMMED] = BACKWARD ? sum * memory.delta_unit[i / SUMMED] : sum;
    }
    if (BACKWARD && threadIdx.x < samples) {
        float sum = 0.0f;
        for (int j = 0; j < WARPS; j++) sum += memory.along[j][threadIdx.x];
        partial[(long long)threadIdx.x * LINE + R] = sum * memory.delta_unit[threadIdx.x];
    }
}
