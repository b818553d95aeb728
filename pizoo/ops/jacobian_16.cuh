// Rows of halves for jacobian.cu: fetched chunk by chunk through a tensor map, and read by the products as they lie there.

#include "hopper.cuh"

typedef half_t entry_t;
typedef TensorMap rows_t;  // as a parameter
struct Source {
    const TensorMap& B;
    const half_t* A;
    const float* amult;
    __device__ Source(const rows_t& B, const entry_t* A, const float* amult, const float*) : B(B), A(A), amult(amult) {}
};

constexpr int CHUNKS = R > WIDTH ? chunks_of(R) : 2;  // at least one for either multiplier
constexpr int BLOCK = CHUNKS * CHUNK;
constexpr int FIRST_TILES = (CHUNKS + 1) / 2, SECOND_TILES = CHUNKS - FIRST_TILES;  // of 64 columns, of the multipliers
// Three warpgroups of 168 registers a thread when the program starts.
constexpr int MAKER_REGISTERS = 120, FIRST_REGISTERS = 192, SECOND_REGISTERS = 192;

struct Inputs {
    alignas(16) half_t slices[2 * steps_of(R)][SAMPLES][8];  // [group of 8 columns][sample][column]
};
__device__ __forceinline__ void store(Inputs& inputs, const float* gbar, int samples) {
    store_inputs<R>(inputs.slices, gbar, samples, nullptr);
}

// One thread: the rows of a block into their place in the ring, which nobody reads any more.
__device__ __forceinline__ void fetch(unsigned char* block, const Source& from, int first, int, barrier_t* arrived) {
    arrive(arrived, BLOCK);
    for (int c = 0; c < CHUNKS; c++) fetch_chunk(block + c * CHUNK, from.B, c * WIDTH, first, arrived);
}

// Correlations of a thread's 2 rows, 8 apart, and 2 samples.
__device__ __forceinline__ void correlate(float (&q)[4], const unsigned char* block, const Inputs& inputs) {
    const unsigned chunks = shared_address(block), gbar = shared_address(inputs.slices);
    begin_products();
    #pragma unroll
    for (int k = 0; k < steps_of(R); k++)
        multiply<0>(q, matrix(CHUNK_MATRIX, chunks + k / 4 * CHUNK + k % 4 * 32),
                    matrix(slice_matrix(SAMPLES), gbar + k * slice_of(SAMPLES)), k > 0);
    commit_products();
    wait_for_products<0>();
    settle(q);
}

// sums += rows^T weights, of OWN tiles from FIRST on.
template <int FIRST, int OWN, int SUMS>
__device__ __forceinline__ void multiply_block(float (&sums)[OWN][SUMS], const unsigned char* block, unsigned weights) {
    const unsigned chunks = shared_address(block + FIRST * CHUNK);
    begin_products();
    #pragma unroll
    for (int k = 0; k < ROWS / 16; k++)
        #pragma unroll
        for (int t = 0; t < OWN; t++)
            multiply<1>(sums[t], matrix(CHUNK_MATRIX, chunks + t * CHUNK + k * 16 * 128),
                        matrix(slice_matrix(2 * SUMS), weights + k * slice_of(2 * SUMS)), 1);
    commit_products();
}

// The column of the first (or second) of a thread's two lines of a tile.
__device__ __forceinline__ int column_of(int tile, int second) {
    return WIDTH * tile + 16 * (threadIdx.x / 32 % 4) + 8 * second + threadIdx.x % 32 / 4;
}

// The weights of all blocks, and the outputs. A thread has 2 rows of a block, 8 apart, and 2 samples of each.
template <typename Memory>
__device__ __forceinline__ void make_blocks(Memory& memory, const Share& share, const Source& source, int turns) {
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
            const half_t* from = source.A + (long long)row * STRIDE_A;
            next_amult[h] = used ? source.amult[row] : 0.0f;
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
        float q[SAMPLES / 2];
        correlate(q, memory.ring[stage], memory.gbar);
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
            for (int c = 0; c < CHUNKS; c++) clear_beyond(memory.ring[stage] + c * CHUNK, rows, thread);
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
}
