// The read-out's output and Jacobian in one pass over its rows, for NVIDIA GPUs of compute capability 9.0.
//
// Computes what pizoo.ops.reference.growing_forward_jacobian says, with w = amult A:
//     partial[program, b, o, :r]    = sum_m F11(q_bm) w_mo B_m
//     partial[program, b, o, r]     = sum_m F00(q_bm) w_mo
//     partial[program, b, o, r + 1] = sum_m F02(q_bm) w_mo   (and 2 columns of padding: lines start at multiples of 16 bytes)
// over this program's rows, q = gbar B^T clamped to [-1, 1].
//
// One program a multiprocessor keeps all SAMPLES x OUTPUTS x r sums in its registers: columns of B stand first in the products,
// samples of each output second. Blocks of 64 rows come into a ring of STAGES buffers and stay there for both products. The
// warpgroups have roles:
//     a maker turns a block's correlations into weights F11 w (bmult) and adds up the outputs;
//     two multipliers own a share of the columns each and add weights times rows to their sums; they fetch the rows, too.
// No atomics, fixed order: two runs give the same bits. What depends on the bits of an entry stands in jacobian_16.cuh and
// jacobian_8.cuh.
//
// Given by the compiler's command line: R (a multiple of 8, of 8-bit rows of 4), OUTPUTS, SAMPLES (8), STRIDE_A (in elements; rows
// of A start at even ones), STAGES, SHARED (bytes of shared memory a program gets), EIGHT_BIT, BFLOAT16.

constexpr int PAIRS = (OUTPUTS + 1) / 2;
constexpr int BUFFERS = 2;  // of weights

#if EIGHT_BIT
#include "jacobian_8.cuh"
#else
#include "jacobian_16.cuh"
#endif

constexpr int COLUMNS = 2 * PAIRS * SAMPLES;  // of the products: all samples of each output

struct Memory {
    alignas(1024) unsigned char ring[STAGES][BLOCK];
    alignas(16) Inputs gbar;
    alignas(16) half_t weights[BUFFERS][ROWS / 8][2 * PAIRS][8][SAMPLES];  // [group of 8 rows][output][row][sample]
    float unit[BUFFERS], largest[BUFFERS][4], outputs[4][SAMPLES][OUTPUTS][2];
    barrier_t arrived[STAGES], used[STAGES], made[BUFFERS];  // of rows, of rows and weights, of weights
};
static_assert(sizeof(Memory) <= SHARED, "the ring does not fit shared memory");
static_assert(SAMPLES * OUTPUTS * (R + 4) * 4 <= sizeof(Memory::ring), "the sums do not fit the ring");

// The products of one multiplier: OWN tiles of columns from FIRST on. In the end the sums stand in the ring, [sample][output][R + 4].
template <int FIRST, int OWN>
__device__ __forceinline__ void multiply_blocks(Memory& memory, const Source& source, const Share& share, int turns) {
    float sums[OWN][COLUMNS / 2] = {}, unit = 0.0f;
    for (int turn = 0; turn < turns; turn++) {
        const int stage = turn % STAGES, buffer = turn % BUFFERS;
        wait(&memory.made[buffer], turn / BUFFERS);
        wait(&memory.arrived[stage], turn / STAGES);  // the maker has seen the rows; now they are visible here too
        change_unit(sums, unit, memory.unit[buffer]);
        multiply_block<FIRST>(sums, memory.ring[stage], shared_address(memory.weights[buffer]));
        wait_for_products<0>();
        #pragma unroll
        for (int t = 0; t < OWN; t++) settle(sums[t]);
        release(&memory.used[stage]);
        if (FIRST && threadIdx.x == LANES && turn + STAGES < turns) {
            wait(&memory.used[stage], turn / STAGES);
            fetch(memory.ring[stage], source, share.first + (turn + STAGES) * share.step, share.count, &memory.arrived[stage]);
        }
        __syncwarp();
    }
    __syncthreads();
    float* to = (float*)memory.ring;
    #pragma unroll
    for (int t = 0; t < OWN; t++)
        #pragma unroll
        for (int i = 0; i < COLUMNS / 2; i++) {
            const int sample = threadIdx.x % 4 * 2 + i % 2, o = i / 4, column = column_of(FIRST + t, i / 2 % 2);
            if (o < OUTPUTS && column < R) to[(sample * OUTPUTS + o) * (R + 4) + column] = sums[t][i] * unit;
        }
}

// The maker's outputs, behind the sums.
__device__ __forceinline__ void add_up_outputs(Memory& memory) {
    float* to = (float*)memory.ring;
    for (int i = threadIdx.x - 2 * LANES; i < SAMPLES * OUTPUTS * 4; i += LANES) {
        float sum = 0.0f;
        if (i % 4 < 2)
            for (int j = 0; j < 4; j++) sum += ((const float(*)[2])memory.outputs[j])[i / 4][i % 4];
        to[i / 4 * (R + 4) + R + i % 4] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(3 * LANES, 1)
growing_forward_jacobian(const __grid_constant__ rows_t rows, const float* __restrict__ gbar, const entry_t* __restrict__ A,
                         const float* __restrict__ amult, const float* __restrict__ bmult,
                         const long long* __restrict__ rows_in_use, float* __restrict__ partial, int M, int b) {
    extern __shared__ __align__(1024) unsigned char bytes[];
    Memory& memory = *(Memory*)bytes;
    const int warpgroup = threadIdx.x / LANES, first_sample = SAMPLES * blockIdx.y, samples = samples_of(b);
    const Share share(rows_in_use, M);
    if (share.first >= share.count) return;
    const int turns = (share.count - share.first - 1) / share.step + 1;
    const Source source(rows, A, amult, bmult);

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) expect(&memory.arrived[i], 1), expect(&memory.used[i], 8);
        for (int i = 0; i < BUFFERS; i++) expect(&memory.made[i], 4);
        show_to_products();
        for (int turn = 0; turn < min(STAGES, turns); turn++)
            fetch(memory.ring[turn], source, share.first + turn * share.step, share.count, &memory.arrived[turn]);
    }
    store(memory.gbar, gbar + (long long)first_sample * R, samples);
    show_to_products();
    __syncthreads();

    if (warpgroup > 1) {
        give_registers<MAKER_REGISTERS>();
        make_blocks(memory, share, source, turns);
        __syncthreads();
        add_up_outputs(memory);
    } else if (warpgroup == 0) {
        take_registers<FIRST_REGISTERS>();
        multiply_blocks<0, FIRST_TILES>(memory, source, share, turns);
    } else {
        take_registers<SECOND_REGISTERS>();
        multiply_blocks<FIRST_TILES, SECOND_TILES>(memory, source, share, turns);
    }
    __syncthreads();
    const int size = samples * OUTPUTS * (R + 4) / 4;
    float4* here = (float4*)(partial + ((long long)blockIdx.x * b + first_sample) * OUTPUTS * (R + 4));
    for (int i = threadIdx.x; i < size; i += blockDim.x) here[i] = ((const float4*)memory.ring)[i];
}
