// The growing layer's forward and backward for up to SAMPLES samples a program, for NVIDIA GPUs of compute capability 9.0.
//
// Computes what pizoo.ops.reference says, over this program's rows, with q = gbar B^T clamped to [-1, 1]:
//     forward:  partial[program, b, :OUTPUTS] = sum_m F00(q_bm) amult_m A_m
//     backward: partial[program, b, :R] = sum_m c_bm F11(q_bm) B_m and [.., R] = sum_m c_bm F02(q_bm), c = (delta A^T) amult
//
// One program a multiprocessor keeps all SAMPLES x columns sums in its registers. The warpgroups have roles:
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

#include "hopper.cuh"

constexpr int EARLY_COLUMNS = BACKWARD ? OUTPUTS : R, LATE_COLUMNS = BACKWARD ? R : OUTPUTS;
constexpr int EARLY_CHUNKS = chunks_of(EARLY_COLUMNS), LATE_CHUNKS = chunks_of(LATE_COLUMNS);
constexpr int MULTIPLIERS = LATE_CHUNKS > 1 ? 2 : 1;  // warpgroups; they take chunks in turn
constexpr int BUFFERS = BACKWARD ? 1 : 2;           // of coefficients: backward, the next block's rows wait for products anyway
constexpr int SUMS = SAMPLES / 2;                   // of a thread: 64 x SAMPLES over a warpgroup
constexpr int SLICE = slice_of(SAMPLES);
constexpr unsigned long long SLICE_MATRIX = slice_matrix(SAMPLES);
// Four warpgroups of 128 registers a thread when the program starts.
constexpr bool MANY_SUMS = LATE_CHUNKS > 4;
constexpr int FETCHER_REGISTERS = BACKWARD ? 24 : 32, MAKER_REGISTERS = !BACKWARD ? 112 : MANY_SUMS ? 128 : 168;
constexpr int FIRST_REGISTERS = MANY_SUMS ? 208 : 168, SECOND_REGISTERS = BACKWARD ? 152 : 160;
static_assert(FETCHER_REGISTERS + MAKER_REGISTERS + FIRST_REGISTERS + SECOND_REGISTERS <= 4 * 128, "more registers than there are");

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

// Where this program's sums go.
__device__ __forceinline__ float* line_of(float* partial, int b) {
    return partial + ((long long)blockIdx.x * b + SAMPLES * blockIdx.y) * LINE;
}

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
            fetch_chunk(ring[place.slot], rows, c * WIDTH, first, &arrived[place.slot]);
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

// The products of one multiplier, [64 columns, SAMPLES] a chunk. Every chunk is let go by both multipliers: whoever skipped one
// could take a barrier's phase for the one after.
template <int MULTIPLIER>
__device__ __forceinline__ void multiply_blocks(Memory& memory, const Share& share, float* partial, int b) {
    const int thread = threadIdx.x % LANES, warp = thread / 32, lane = thread % 32;
    constexpr int TILES = (LATE_CHUNKS - MULTIPLIER + MULTIPLIERS - 1) / MULTIPLIERS;
    float sums[TILES][SUMS] = {}, unit = 1.0f;
    Place<LATE> place;
    Place<BUFFERS> made;
    int before = 0;
    for (int rows = share.count - share.first; rows > 0; rows -= share.step) {
        wait(&memory.made[made.slot], made.phase);
        change_unit(sums, unit, memory.unit[made.slot]);
        const unsigned coefficients = shared_address(memory.coefficients[made.slot]);
        #pragma unroll
        for (int c = 0; c < LATE_CHUNKS; c++) {
            wait(&memory.late_arrived[place.slot], place.phase);
            if (c % MULTIPLIERS != MULTIPLIER) {
                release(&memory.late_used[place.slot]);
                place.advance();
                continue;
            }
            if (rows < ROWS) {
                clear_beyond(memory.late[place.slot], rows, thread);
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
    const int samples = samples_of(b);
    partial = line_of(partial, b);
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
__device__ __forceinline__ void make_blocks(Memory& memory, const Share& share, const float* amult, float* partial, int b) {
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

        #pragma unroll
        for (int shift = 16; shift; shift /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, shift));
        const int turn = BUFFERS == 1 ? made.phase : made.slot;  // even or odd
        if (lane == 0) memory.largest[turn][warp] = largest;
        wait_for_warpgroup(1);
        #pragma unroll
        for (int w = 0; w < 4; w++) largest = fmaxf(largest, memory.largest[turn][w]);
        follow(largest, unit, top);
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
    if (thread < samples_of(b)) {
        float total = 0.0f;
        for (int w = 0; w < 4; w++) total += memory.along[w][thread];
        line_of(partial, b)[(long long)thread * LINE + R] = total * memory.delta_unit[thread];
    }
#endif
}

extern "C" __global__ void __launch_bounds__(4 * LANES, 1)
growing_layer(const float* __restrict__ gbar, const float* __restrict__ delta, const __grid_constant__ TensorMap early,
              const __grid_constant__ TensorMap late, const float* __restrict__ amult, const long long* __restrict__ rows_in_use,
              float* __restrict__ partial, int M, int b) {
    extern __shared__ __align__(1024) unsigned char bytes[];
    Memory& memory = *(Memory*)bytes;
    const int warpgroup = threadIdx.x / LANES, first_sample = SAMPLES * blockIdx.y, samples = samples_of(b);
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

    if (warpgroup == 0) {
        give_registers<FETCHER_REGISTERS>();
        if (threadIdx.x == 0) fetch<EARLY_CHUNKS, EARLY>(early, memory.early, memory.early_arrived, memory.early_used, share);
        if (threadIdx.x == 32) fetch<LATE_CHUNKS, LATE>(late, memory.late, memory.late_arrived, memory.late_used, share);
    } else if (warpgroup == 1) {
        if (MAKER_REGISTERS < 128) give_registers<MAKER_REGISTERS>();
        if (MAKER_REGISTERS > 128) take_registers<MAKER_REGISTERS>();
        make_blocks(memory, share, amult, partial, b);
    } else if (warpgroup == 2) {
        take_registers<FIRST_REGISTERS>();
        multiply_blocks<0>(memory, share, partial, b);
    } else {
        take_registers<SECOND_REGISTERS>();
        if constexpr (MULTIPLIERS > 1) multiply_blocks<1>(memory, share, partial, b);
    }
}
