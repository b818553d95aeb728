// The growing layer's forward and backward for up to SAMPLES samples a program, for NVIDIA GPUs of compute capability 9.0.
//
// Computes what pizoo.ops.reference says, over this program's rows, with q = gbar B^T clamped to [-1, 1]:
//     forward:  partial[program, b, :OUTPUTS] = sum_m F00(q_bm) amult_m A_m
//     backward: partial[program, b, :R] = sum_m c_bm F11(q_bm) B_m and [.., R] = sum_m c_bm F02(q_bm), c = (delta A^T) amult
//
// One program a multiprocessor keeps all SAMPLES x columns sums in its registers. Rows, or columns, stand first in every
// product, samples second: 64 x SAMPLES x 16 is one instruction of a warpgroup (4 warps). The warpgroups have roles:
//     a fetcher copies chunks, 64 rows of 64 columns each, into two rings of shared memory;
//     a maker multiplies a block of 64 rows with the inputs (and gradients) and makes the coefficients of the block's rows;
//     two multipliers own a share of the columns each and add coefficients times rows to their sums.
// Forward, a chunk of B is needed for correlations only ("early") and one of A for products only ("late"). Backward, A is early,
// and B is needed for both: it stays until it has been multiplied.
//
// Coefficients of a block are divided by a power of two near the largest, so that neither tiny multipliers nor tiny rows
// underflow; sums are kept in that unit. Gradients at the output are divided by a power of two of their sample. No atomics,
// fixed order: two runs give the same bits.
//
// Given by the compiler's command line: R, OUTPUTS, SAMPLES (a multiple of 16), BACKWARD, EARLY and LATE (chunks in a ring),
// LINE (floats between samples of partial), SHARED (bytes of shared memory a program gets), BFLOAT16.

#include "device.cuh"
#include "wgmma.cuh"  // multiply: generated for SAMPLES

typedef unsigned long long barrier_t;

constexpr int ROWS = 64, WIDTH = 64, LANES = 128;   // of a block, of a chunk, of a warpgroup
constexpr int EARLY_COLUMNS = BACKWARD ? OUTPUTS : R, LATE_COLUMNS = BACKWARD ? R : OUTPUTS;
__device__ constexpr int chunks_of(int columns) { return (columns + WIDTH - 1) / WIDTH; }
__device__ constexpr int steps_of(int columns) { return (columns + 15) / 16; }  // products of 16 columns
constexpr int EARLY_CHUNKS = chunks_of(EARLY_COLUMNS), LATE_CHUNKS = chunks_of(LATE_COLUMNS);
constexpr int MULTIPLIERS = LATE_CHUNKS > 1 ? 2 : 1;  // warpgroups; they take chunks in turn
constexpr int BUFFERS = BACKWARD ? 1 : 2;           // of coefficients: backward, the next block's rows wait for products anyway
constexpr int SUMS = SAMPLES / 2;                   // of a thread: 64 x SAMPLES over a warpgroup
constexpr int CHUNK = ROWS * WIDTH * 2;             // bytes
constexpr int SLICE = 2 * SAMPLES * 16;             // bytes of 16 columns of inputs, or of coefficients of 16 rows
// Four warpgroups of 128 registers a thread when the program starts.
constexpr bool MANY_SUMS = LATE_CHUNKS > 4;
constexpr int FETCHER_REGISTERS = BACKWARD ? 24 : 32, MAKER_REGISTERS = !BACKWARD ? 112 : MANY_SUMS ? 128 : 168;
constexpr int FIRST_REGISTERS = MANY_SUMS ? 208 : 168, SECOND_REGISTERS = BACKWARD ? 152 : 160;
static_assert(FETCHER_REGISTERS + MAKER_REGISTERS + FIRST_REGISTERS + SECOND_REGISTERS <= 4 * 128, "more registers than there are");

struct TensorMap { alignas(64) unsigned char bytes[128]; };

struct Memory {
    alignas(1024) unsigned char early[EARLY][CHUNK];  // as the copy engine writes chunks: lines of 128 bytes, swizzled
    alignas(1024) unsigned char late[LATE][CHUNK];
    alignas(16) half_t gbar[2 * steps_of(R)][SAMPLES][8];  // [group of 8 columns][sample][column]
    alignas(16) half_t delta[BACKWARD ? 2 * steps_of(OUTPUTS) : 1][SAMPLES][8];
    alignas(16) half_t coefficients[BUFFERS][ROWS / 8][SAMPLES / 8][8][8];  // [group of rows][group of samples][row][sample]
    float delta_unit[SAMPLES], along[4][SAMPLES], largest[2][4], unit[BUFFERS];
    barrier_t early_arrived[EARLY], early_used[EARLY], late_arrived[LATE], late_used[LATE], made[BUFFERS], multiplied[BUFFERS];
};
static_assert(sizeof(Memory) <= SHARED, "the rings do not fit shared memory");
static_assert(LATE >= (BACKWARD ? LATE_CHUNKS : 2) && EARLY >= 2, "too few chunks in a ring");

// Where a matrix product finds a matrix: address, two strides and the swizzle, all but the last in units of 16 bytes.
// Chunks: 8 lines of 128 bytes apart, swizzled, be it columns or rows that are summed over. The others, not swizzled: groups of
// 8 samples are 128 bytes apart, groups of 8 columns of inputs, or of 8 rows of coefficients, SLICE / 2.
constexpr unsigned long long CHUNK_MATRIX = (1ull << 62) | ((8 * 128ull >> 4) << 32) | (1ull << 16);
constexpr unsigned long long SLICE_MATRIX = ((128ull >> 4) << 32) | ((SLICE / 2ull >> 4) << 16);
__device__ __forceinline__ unsigned long long matrix(unsigned long long kind, unsigned address) { return kind | (address >> 4); }

// Products run beside the program from commit_products on; their sums may be touched after wait_for_products.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// Keeps the compiler from moving what it does with sums across this point.
__device__ __forceinline__ void settle(float (&sums)[SUMS]) {
    #pragma unroll
    for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sums[i])::"memory");
}
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wait_for_warpgroup(int id) { asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(LANES) : "memory"); }
template <int REGISTERS>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
// Once a warp.
__device__ __forceinline__ void release(barrier_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(barrier);
}

// This program's blocks: the first row of the first, from one to the next, and where rows in use end.
struct Share {
    int first, step, count;
    __device__ Share(const long long* rows_in_use, int M) {
        first = blockIdx.x * ROWS, step = gridDim.x * ROWS;
        count = rows_in_use ? (int)min(*rows_in_use, (long long)M) : M;
    }
};

// A place in a ring of SLOTS, and how often, even or odd, it has been passed.
template <int SLOTS>
struct Place {
    int slot = 0, phase = 0;
    __device__ void advance() {
        if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
};

// One thread: every chunk of this program's blocks, in order, as their places in the ring become free.
template <int CHUNKS, int SLOTS>
__device__ __forceinline__ void fetch(const TensorMap& rows, unsigned char (*ring)[CHUNK], barrier_t* arrived, barrier_t* used,
                                      const Share& share) {
    Place<SLOTS> place;
    for (int first = share.first; first < share.count; first += share.step)
        #pragma unroll 1
        for (int c = 0; c < CHUNKS; c++) {
            wait(&used[place.slot], place.phase + 1);  // the first time around nobody has used it: that phase counts as past
            arrive(&arrived[place.slot], CHUNK);
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                         ::"r"(shared_address(ring[place.slot])), "l"(&rows), "r"(c * WIDTH), "r"(first),
                           "r"(shared_address(&arrived[place.slot])) : "memory");
            place.advance();
        }
}

// sums [64 rows, SAMPLES] = rows inputs^T of the next block; chunks are let go where nobody needs them afterwards.
template <int COLUMNS, int SLOTS, bool LET_GO>
__device__ __forceinline__ void contract(float (&sums)[SUMS], unsigned char (*ring)[CHUNK], const half_t* inputs,
                                         barrier_t* arrived, barrier_t* used, Place<SLOTS>& place) {
    constexpr int CHUNKS = chunks_of(COLUMNS);
    const unsigned to = shared_address(inputs);
    int before = 0;
    #pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        wait(&arrived[place.slot], place.phase);
        const unsigned chunk = shared_address(ring[place.slot]);
        begin_products();
        #pragma unroll
        for (int k = 4 * c; k < min(4 * c + 4, steps_of(COLUMNS)); k++)
            multiply<0>(sums, matrix(CHUNK_MATRIX, chunk + (k - 4 * c) * 32), matrix(SLICE_MATRIX, to + k * SLICE), k > 0);
        commit_products();
        if (LET_GO && c) {
            wait_for_products<1>();
            release(&used[before]);
        }
        before = place.slot;
        place.advance();
    }
    wait_for_products<0>();
    settle(sums);
    if (LET_GO) release(&used[before]);
}

// Zero to a program's inputs [SAMPLES, COLUMNS] in the order products want, divided by a unit of their sample.
template <int COLUMNS>
__device__ __forceinline__ void store_inputs(half_t (*to)[SAMPLES][8], const float* from, int samples, const float* unit) {
    for (int i = threadIdx.x; i < 2 * steps_of(COLUMNS) * SAMPLES; i += blockDim.x) {
        const int sample = i % SAMPLES, group = i / SAMPLES;
        const float inverse = unit ? inverse_power(unit[sample]) : 1.0f;
        auto at = [&](int j) {
            const int column = 8 * group + j;
            return sample < samples && column < COLUMNS ? from[(long long)sample * COLUMNS + column] * inverse : 0.0f;
        };
        *(uint4*)to[group][sample] = make_uint4(pack(at(0), at(1)), pack(at(2), at(3)), pack(at(4), at(5)), pack(at(6), at(7)));
    }
}

// The products of one multiplier, [64 columns, SAMPLES] a chunk. Every chunk is let go by both multipliers: whoever skipped one
// could take a barrier's phase for the one after.
template <int MULTIPLIER>
__device__ __forceinline__ void multiply_blocks(Memory& memory, const Share& share, float* partial, int samples) {
    const int thread = threadIdx.x % LANES, warp = thread / 32, lane = thread % 32;
    constexpr int TILES = (LATE_CHUNKS - MULTIPLIER + MULTIPLIERS - 1) / MULTIPLIERS;
    float sums[TILES][SUMS] = {}, unit = 1.0f;
    Place<LATE> place;
    Place<BUFFERS> made;
    int before = 0;
    for (int rows = share.count - share.first; rows > 0; rows -= share.step) {
        wait(&memory.made[made.slot], made.phase);
        const float next = memory.unit[made.slot];
        if (next != unit) {
            const float factor = unit * inverse_power(next);
            #pragma unroll
            for (int t = 0; t < TILES; t++) {
                #pragma unroll
                for (int i = 0; i < SUMS; i++) sums[t][i] *= factor;
                settle(sums[t]);
            }
            unit = next;
        }
        const unsigned coefficients = shared_address(memory.coefficients[made.slot]);
        #pragma unroll
        for (int c = 0; c < LATE_CHUNKS; c++) {
            wait(&memory.late_arrived[place.slot], place.phase);
            if (c % MULTIPLIERS != MULTIPLIER) {
                release(&memory.late_used[place.slot]);
                place.advance();
                continue;
            }
            if (rows < ROWS) {  // what stands beyond rows in use may be anything: zero times it might not be zero
                for (int j = 8 * rows + thread; j < 8 * ROWS; j += LANES) ((uint4*)memory.late[place.slot])[j] = make_uint4(0, 0, 0, 0);
                show_to_products();
                wait_for_warpgroup(2 + MULTIPLIER);
            }
            const unsigned chunk = shared_address(memory.late[place.slot]);
            begin_products();
            #pragma unroll
            for (int k = 0; k < ROWS / 16; k++)
                multiply<1>(sums[c / MULTIPLIERS], matrix(CHUNK_MATRIX, chunk + k * 16 * 128), matrix(SLICE_MATRIX, coefficients + k * SLICE), 1);
            commit_products();
            if (c >= MULTIPLIERS) {
                wait_for_products<1>();
                release(&memory.late_used[before]);
            }
            before = place.slot;
            place.advance();
        }
        wait_for_products<0>();
        #pragma unroll
        for (int t = 0; t < TILES; t++) settle(sums[t]);
        release(&memory.late_used[before]);
        release(&memory.multiplied[made.slot]);
        made.advance();
    }
    #pragma unroll
    for (int t = 0; t < TILES; t++)
        #pragma unroll
        for (int i = 0; i < SUMS; i++) {
            const int column = WIDTH * (MULTIPLIERS * t + MULTIPLIER) + 16 * warp + lane / 4 + i / 2 % 2 * 8;
            const int sample = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (column < LATE_COLUMNS && sample < samples)
                partial[(long long)sample * LINE + column] = sums[t][i] * unit * (BACKWARD ? memory.delta_unit[sample] : 1.0f);
        }
}

// The coefficients of all blocks. A thread has 2 rows of a block, 8 apart, and SAMPLES / 4 samples of each.
__device__ __forceinline__ void make_blocks(Memory& memory, const Share& share, const float* amult, float* partial, int samples) {
    const int thread = threadIdx.x % LANES, warp = thread / 32, lane = thread % 32, own_row = 16 * warp + lane / 4;
    float along[BACKWARD ? SUMS / 2 : 1] = {}, unit = 0.0f, top = 0.0f;
    Place<EARLY> early;
    Place<LATE> late;
    Place<BUFFERS> made;
    for (int first = share.first; first < share.count; first += share.step) {
        const int row = first + own_row;
        const float weights[2] = {row < share.count ? amult[row] : 0.0f, row + 8 < share.count ? amult[row + 8] : 0.0f};
        float gradients[BACKWARD ? SUMS : 1], q[SUMS], largest = 0.0f;
#if BACKWARD
        contract<OUTPUTS, EARLY, true>(gradients, memory.early, memory.delta[0][0], memory.early_arrived, memory.early_used, early);
        contract<R, LATE, false>(q, memory.late, memory.gbar[0][0], memory.late_arrived, memory.late_used, late);
        if (first + ROWS > share.count)
            #pragma unroll
            for (int i = 0; i < SUMS; i++)
                if (row + i / 2 % 2 * 8 >= share.count) gradients[i] = 0.0f;
#else
        contract<R, EARLY, true>(q, memory.early, memory.gbar[0][0], memory.early_arrived, memory.early_used, early);
#endif
        #pragma unroll
        for (int i = 0; i < SUMS; i++) {
            float F00, F11, F02;
            arc_cosine_kernels(q[i], F00, F11, F02);
            if (BACKWARD) {
                const float gradient = gradients[i] * weights[i / 2 % 2];
                along[i / 4 * 2 + i % 2] += gradient * F02;
                q[i] = gradient * F11;
            } else {
                q[i] = F00 * weights[i / 2 % 2];
            }
            largest = fmaxf(largest, fabsf(q[i]));
        }

        // One unit for the block: kept while it is near enough, and no smaller than 2^-40 of the largest coefficient so far, so
        // that sums cannot overflow.
        #pragma unroll
        for (int shift = 16; shift; shift /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, shift));
        const int turn = BUFFERS == 1 ? made.phase : made.slot;  // even or odd
        if (lane == 0) memory.largest[turn][warp] = largest;
        wait_for_warpgroup(1);
        #pragma unroll
        for (int w = 0; w < 4; w++) largest = fmaxf(largest, memory.largest[turn][w]);
        top = fmaxf(top, largest);
        const float near = power_of_two(fmaxf(largest, top * 9.094947e-13f));
        if (near > 32 * unit || 32 * near < unit) unit = near;
        const float inverse = inverse_power(unit);

        wait(&memory.multiplied[made.slot], made.phase + 1);
        #pragma unroll
        for (int i = 0; i < SUMS; i += 2) {
            half_t(*to)[8] = memory.coefficients[made.slot][2 * warp + i / 2 % 2][i / 4];
            ((pair_t*)to)[lane] = pack(q[i] * inverse, q[i + 1] * inverse);
        }
        if (thread == 0) memory.unit[made.slot] = unit;
        show_to_products();
        release(&memory.made[made.slot]);
        made.advance();
    }
#if BACKWARD
    #pragma unroll
    for (int i = 0; i < SUMS / 2; i++) {
        #pragma unroll
        for (int shift = 16; shift >= 4; shift /= 2) along[i] += __shfl_xor_sync(~0u, along[i], shift);
        if (lane < 4) memory.along[warp][i / 2 * 8 + lane * 2 + i % 2] = along[i];
    }
    wait_for_warpgroup(1);
    if (thread < samples) {
        float total = 0.0f;
        for (int w = 0; w < 4; w++) total += memory.along[w][thread];
        partial[(long long)thread * LINE + R] = total * memory.delta_unit[thread];
    }
#endif
}

extern "C" __global__ void __launch_bounds__(4 * LANES, 1)
growing_layer(const float* __restrict__ gbar, const float* __restrict__ delta, const __grid_constant__ TensorMap early,
              const __grid_constant__ TensorMap late, const float* __restrict__ amult, const long long* __restrict__ rows_in_use,
              float* __restrict__ partial, int M, int b) {
    extern __shared__ __align__(1024) unsigned char bytes[];
    Memory& memory = *(Memory*)bytes;
    const int warpgroup = threadIdx.x / LANES, first_sample = SAMPLES * blockIdx.y, samples = min(SAMPLES, b - first_sample);
    const Share share(rows_in_use, M);
    if (share.first >= share.count) return;

    if (threadIdx.x == 0) {
        for (int i = 0; i < EARLY; i++) expect(&memory.early_arrived[i], 1), expect(&memory.early_used[i], 4);
        for (int i = 0; i < LATE; i++) expect(&memory.late_arrived[i], 1), expect(&memory.late_used[i], 4 * MULTIPLIERS);
        for (int i = 0; i < BUFFERS; i++) expect(&memory.made[i], 4), expect(&memory.multiplied[i], 4 * MULTIPLIERS);
    }
    gbar += (long long)first_sample * R;
    store_inputs<R>(memory.gbar, gbar, samples, nullptr);
    if (BACKWARD) {
        delta += (long long)first_sample * OUTPUTS;
        for (int sample = threadIdx.x / 32; sample < SAMPLES; sample += blockDim.x / 32) {
            float largest = 0.0f;
            for (int o = threadIdx.x % 32; o < OUTPUTS && sample < samples; o += 32)
                largest = fmaxf(largest, fabsf(delta[(long long)sample * OUTPUTS + o]));
            for (int shift = 16; shift; shift /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, shift));
            memory.delta_unit[sample] = power_of_two(largest);
        }
        __syncthreads();
        store_inputs<OUTPUTS>(memory.delta, delta, samples, memory.delta_unit);
    }
    show_to_products();
    __syncthreads();

    partial += ((long long)blockIdx.x * b + first_sample) * LINE;
    if (warpgroup == 0) {
        give_registers<FETCHER_REGISTERS>();
        if (threadIdx.x == 0) fetch<EARLY_CHUNKS, EARLY>(early, memory.early, memory.early_arrived, memory.early_used, share);
        if (threadIdx.x == 32) fetch<LATE_CHUNKS, LATE>(late, memory.late, memory.late_arrived, memory.late_used, share);
    } else if (warpgroup == 1) {
        if (MAKER_REGISTERS < 128) give_registers<MAKER_REGISTERS>();
        if (MAKER_REGISTERS > 128) take_registers<MAKER_REGISTERS>();
        make_blocks(memory, share, amult, partial, samples);
    } else if (warpgroup == 2) {
        take_registers<FIRST_REGISTERS>();
        multiply_blocks<0>(memory, share, partial, samples);
    } else {
        take_registers<SECOND_REGISTERS>();
        if constexpr (MULTIPLIERS > 1) multiply_blocks<1>(memory, share, partial, samples);
    }
}
