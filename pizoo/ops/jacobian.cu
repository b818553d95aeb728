// The read-out's output and Jacobian in one pass over its rows, for NVIDIA GPUs of compute capability 9.0.
//
// Computes what pizoo.ops.reference.growing_forward_jacobian says, with w = amult A:
//     partial[program, b, o, :r]    = sum_m F11(q_bm) w_mo B_m
//     partial[program, b, o, r]     = sum_m F00(q_bm) w_mo
//     partial[program, b, o, r + 1] = sum_m F02(q_bm) w_mo   (and 2 columns of padding: lines start at multiples of 16 bytes)
// over this program's rows, q = gbar B^T clamped to [-1, 1].
//
// One program a multiprocessor keeps all SAMPLES x OUTPUTS x r sums in its registers: columns of B stand first in the products,
// samples of each output second. Blocks of 64 rows come into a ring of STAGES buffers, chunk by chunk, and are read there as they
// lie by both products: for the correlations along the columns, for the sums along the rows. The warpgroups have roles:
//     a maker turns a block's correlations into weights F11 w and adds up the outputs;
//     two multipliers own a share of the columns each and add weights times rows to their sums; they fetch the rows, too.
// No atomics, fixed order: two runs give the same bits.
//
// Given by the compiler's command line: R (a multiple of 8), OUTPUTS, SAMPLES (8), STRIDE_A (in elements; rows of A start at even
// ones), STAGES, SHARED (bytes of shared memory a program gets), BFLOAT16.

#include "hopper.cuh"

constexpr int CHUNKS = R > WIDTH ? chunks_of(R) : 2;  // at least one for either multiplier
constexpr int FIRST_CHUNKS = (CHUNKS + 1) / 2;        // of the first multiplier; the second has the others
constexpr int PAIRS = (OUTPUTS + 1) / 2;
constexpr int COLUMNS = 2 * PAIRS * SAMPLES;          // of the products: all samples of each output
constexpr int BUFFERS = 2;                            // of weights
// Three warpgroups of 168 registers a thread when the program starts.
constexpr int MAKER_REGISTERS = 120, MULTIPLIER_REGISTERS = 192;

struct Memory {
    alignas(1024) unsigned char ring[STAGES][CHUNKS][CHUNK];
    alignas(16) half_t gbar[2 * steps_of(R)][SAMPLES][8];                 // [group of 8 columns][sample][column]
    alignas(16) half_t weights[BUFFERS][ROWS / 8][2 * PAIRS][8][SAMPLES];  // [group of 8 rows][output][row][sample]
    float unit[BUFFERS], largest[BUFFERS][4], outputs[4][SAMPLES][OUTPUTS][2];
    barrier_t arrived[STAGES], used[STAGES], made[BUFFERS];  // of rows, of rows and weights, of weights
};
static_assert(sizeof(Memory) <= SHARED, "the ring does not fit shared memory");
static_assert(SAMPLES * OUTPUTS * (R + 4) * 4 <= sizeof(Memory::ring), "the sums do not fit the ring");

// One thread: the rows of a block into their place in the ring, which nobody reads any more.
__device__ __forceinline__ void fetch(Memory& memory, const TensorMap& rows, const Share& share, int turn) {
    const int stage = turn % STAGES;
    arrive(&memory.arrived[stage], CHUNKS * CHUNK);
    for (int c = 0; c < CHUNKS; c++)
        fetch_chunk(memory.ring[stage][c], rows, c * WIDTH, share.first + turn * share.step, &memory.arrived[stage]);
}

// The products of one multiplier: OWN chunks from FIRST on. In the end the sums stand in the ring, [sample][output][R + 4].
template <int FIRST, int OWN>
__device__ __forceinline__ void multiply_blocks(Memory& memory, const TensorMap& rows, const Share& share, int turns) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sums[OWN][COLUMNS / 2] = {}, unit = 0.0f;
    for (int turn = 0; turn < turns; turn++) {
        const int stage = turn % STAGES, buffer = turn % BUFFERS;
        wait(&memory.made[buffer], turn / BUFFERS);
        wait(&memory.arrived[stage], turn / STAGES);  // the maker has seen the rows; now they are visible here too
        change_unit(sums, unit, memory.unit[buffer]);
        const unsigned chunks = shared_address(memory.ring[stage][FIRST]), weights = shared_address(memory.weights[buffer]);
        begin_products();
        #pragma unroll
        for (int k = 0; k < ROWS / 16; k++)
            #pragma unroll
            for (int t = 0; t < OWN; t++)
                multiply<1>(sums[t], matrix(CHUNK_MATRIX, chunks + t * CHUNK + k * 16 * 128),
                            matrix(slice_matrix(COLUMNS), weights + k * slice_of(COLUMNS)), 1);
        commit_products();
        wait_for_products<0>();
        #pragma unroll
        for (int t = 0; t < OWN; t++) settle(sums[t]);
        release(&memory.used[stage]);
        if (FIRST && threadIdx.x == LANES && turn + STAGES < turns) {
            wait(&memory.used[stage], turn / STAGES);
            fetch(memory, rows, share, turn + STAGES);
        }
        __syncwarp();
    }
    __syncthreads();
    float* to = (float*)memory.ring;
    #pragma unroll
    for (int t = 0; t < OWN; t++)
        #pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) {
            const int sample = lane % 4 * 2 + i % 2, o = i / 4;
            const int column = WIDTH * (FIRST + t) + 16 * (warp % 4) + 8 * (i / 2 % 2) + lane / 4;
            if (o < OUTPUTS && column < R) to[(sample * OUTPUTS + o) * (R + 4) + column] = sums[t][i] * unit;
        }
}

// The weights of all blocks, and the outputs. A thread has 2 rows of a block, 8 apart, and 2 samples of each.
__device__ __forceinline__ void make_blocks(Memory& memory, const Share& share, const half_t* A, const float* amult, int turns) {
    const int thread = threadIdx.x % LANES, warp = thread / 32, lane = thread % 32, own_row = 16 * warp + lane / 4;
    float outputs[OUTPUTS][2][2] = {}, unit = 0.0f, top = 0.0f;
    // Rows of A and multipliers, loaded a turn ahead, straight from memory.
    pair_t next_A[2][PAIRS];
    float next_amult[2];
    auto fetch_weights = [&](int turn) {
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = share.first + turn * share.step + own_row + 8 * h;
            const bool used = turn < turns && row < share.count;
            const half_t* from = A + (long long)row * STRIDE_A;
            next_amult[h] = used ? amult[row] : 0.0f;
            #pragma unroll
            for (int p = 0; p < PAIRS; p++)
                next_A[h][p] = !used ? 0 : 2 * p + 1 < OUTPUTS ? *(const pair_t*)&from[2 * p] : from[2 * p];
        }
    };
    fetch_weights(0);
    for (int turn = 0; turn < turns; turn++) {
        const int stage = turn % STAGES, buffer = turn % BUFFERS;
        float w[2][2 * PAIRS], largest = 0.0f;
        #pragma unroll
        for (int h = 0; h < 2; h++)
            #pragma unroll
            for (int o = 0; o < 2 * PAIRS; o++) {
                w[h][o] = unpack((half_t)(next_A[h][o / 2] >> o % 2 * 16)) * next_amult[h];
                largest = fmaxf(largest, fabsf(w[h][o]));
            }
        #pragma unroll
        for (int shift = 16; shift >= 4; shift /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, shift));
        if (lane == 0) memory.largest[buffer][warp] = largest;
        fetch_weights(turn + 1);

        wait(&memory.arrived[stage], turn / STAGES);
        const unsigned chunks = shared_address(memory.ring[stage]), gbar = shared_address(memory.gbar);
        float q[SAMPLES / 2];
        begin_products();
        #pragma unroll
        for (int k = 0; k < steps_of(R); k++)
            multiply<0>(q, matrix(CHUNK_MATRIX, chunks + k / 4 * CHUNK + k % 4 * 32),
                        matrix(slice_matrix(SAMPLES), gbar + k * slice_of(SAMPLES)), k > 0);
        commit_products();
        wait_for_products<0>();
        settle(q);
        wait_for_warpgroup(1);
        #pragma unroll
        for (int i = 0; i < 4; i++) largest = fmaxf(largest, memory.largest[buffer][i]);
        follow(largest, unit, top);

        float F00[4], F11[4], F02[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) arc_cosine_kernels(q[i], F00[i], F11[i], F02[i]);
        #pragma unroll
        for (int o = 0; o < OUTPUTS; o++)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                outputs[o][i % 2][0] += F00[i] * w[i / 2][o];
                outputs[o][i % 2][1] += F02[i] * w[i / 2][o];
            }

        if (turn >= BUFFERS) wait(&memory.used[(turn - BUFFERS) % STAGES], (turn - BUFFERS) / STAGES);
        const float inverse = inverse_power(unit);
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const float low = F11[2 * h] * inverse, high = F11[2 * h + 1] * inverse;
            #pragma unroll
            for (int o = 0; o < 2 * PAIRS; o++)
                ((pair_t*)memory.weights[buffer][2 * warp + h][o])[lane] = pack(low * w[h][o], high * w[h][o]);
        }
        if (thread == 0) memory.unit[buffer] = unit;
        const int rows = share.count - share.first - turn * share.step;
        if (rows < ROWS)
            for (int c = 0; c < CHUNKS; c++) clear_beyond(memory.ring[stage][c], rows, thread);
        show_to_products();
        release(&memory.made[buffer]);
    }
    #pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float& sum = outputs[o][i / 2][i % 2];
            #pragma unroll
            for (int shift = 16; shift >= 4; shift /= 2) sum += __shfl_xor_sync(~0u, sum, shift);
            if (lane < 4) memory.outputs[warp][2 * lane + i / 2][o][i % 2] = sum;
        }
    __syncthreads();
    float* to = (float*)memory.ring;
    for (int i = thread; i < SAMPLES * OUTPUTS * 4; i += LANES) {
        float sum = 0.0f;
        if (i % 4 < 2)
            for (int j = 0; j < 4; j++) sum += ((const float(*)[2])memory.outputs[j])[i / 4][i % 4];
        to[i / 4 * (R + 4) + R + i % 4] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(3 * LANES, 1)
growing_forward_jacobian(const __grid_constant__ TensorMap rows, const float* __restrict__ gbar, const half_t* __restrict__ A,
                         const float* __restrict__ amult, const long long* __restrict__ rows_in_use,
                         float* __restrict__ partial, int M, int b) {
    extern __shared__ __align__(1024) unsigned char bytes[];
    Memory& memory = *(Memory*)bytes;
    const int warpgroup = threadIdx.x / LANES, first_sample = SAMPLES * blockIdx.y, samples = samples_of(b);
    const Share share(rows_in_use, M);
    if (share.first >= share.count) return;
    const int turns = (share.count - share.first - 1) / share.step + 1;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) expect(&memory.arrived[i], 1), expect(&memory.used[i], 8);
        for (int i = 0; i < BUFFERS; i++) expect(&memory.made[i], 4);
        show_to_products();
        for (int turn = 0; turn < min(STAGES, turns); turn++) fetch(memory, rows, share, turn);
    }
    store_inputs<R>(memory.gbar, gbar + (long long)first_sample * R, samples, nullptr);
    show_to_products();
    __syncthreads();

    if (warpgroup == 2) {
        give_registers<MAKER_REGISTERS>();
        make_blocks(memory, share, A, amult, turns);
    } else if (warpgroup == 0) {
        take_registers<MULTIPLIER_REGISTERS>();
        multiply_blocks<0, FIRST_CHUNKS>(memory, rows, share, turns);
    } else {
        take_registers<MULTIPLIER_REGISTERS>();
        multiply_blocks<FIRST_CHUNKS, CHUNKS - FIRST_CHUNKS>(memory, rows, share, turns);
    }
    __syncthreads();
    const int size = samples * OUTPUTS * (R + 4) / 4;
    float4* here = (float4*)(partial + ((long long)blockIdx.x * b + first_sample) * OUTPUTS * (R + 4));
    for (int i = threadIdx.x; i < size; i += blockDim.x) here[i] = ((const float4*)memory.ring)[i];
}
