// What the kernels for compute capability 9.0 share: chunks of rows, fetched by the copy engine, and the matrix products of
// warpgroups (4 warps), which read shared memory themselves.
//
// Rows, or columns, stand first in every product, samples second: 64 x samples x 16 is one instruction.
//
// Given by the program that compiles: wgmma.cuh, with
//     multiply<TRANSPOSED>(sums, a, b, more):  sums [64, n] = a [64, 16] b [16, n], or += with more; n follows from sums.
//     multiply_registers(sums, a, b):  sums += a b likewise, a in registers, b as transposed.
// Transposed (1), rows of chunks are summed over, else columns.

#include "device.cuh"
#include "wgmma.cuh"

constexpr int ROWS = 64, WIDTH = 64, LANES = 128;   // of a block and chunk, of a chunk, of a warpgroup
constexpr int CHUNK = ROWS * WIDTH * 2;             // bytes: lines of 128, swizzled
__device__ constexpr int chunks_of(int columns) { return (columns + WIDTH - 1) / WIDTH; }
__device__ constexpr int steps_of(int columns) { return (columns + 15) / 16; }  // products of 16 columns

struct TensorMap { alignas(64) unsigned char bytes[128]; };

__device__ __forceinline__ void fetch_chunk(unsigned char* to, const TensorMap& rows, int column, int row, barrier_t* arrived) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(shared_address(to)), "l"(&rows), "r"(column), "r"(row), "r"(shared_address(arrived)) : "memory");
}

// Where a matrix product finds a matrix: address, two strides and the swizzle, all but the last in units of 16 bytes.
// Chunks: 8 lines are 1024 bytes apart, be it columns or rows that are summed over. Slices, 16 columns of inputs [group of 8
// columns][sample][column] or coefficients of 16 rows [group of 8 rows][group of 8 samples][row][sample], are not swizzled:
// groups of 8 samples are 128 bytes apart, groups of 8 columns, or rows, half a slice.
__device__ constexpr int slice_of(int samples) { return 2 * samples * 16; }  // bytes
constexpr unsigned long long CHUNK_MATRIX = (1ull << 62) | ((8 * 128ull >> 4) << 32) | (1ull << 16);
__device__ constexpr unsigned long long slice_matrix(int samples) {
    return ((128ull >> 4) << 32) | ((slice_of(samples) / 2ull >> 4) << 16);
}
__device__ __forceinline__ unsigned long long matrix(unsigned long long kind, unsigned address) { return kind | (address >> 4); }

// Products run beside the program from commit_products on; their sums may be touched after wait_for_products.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }
// Keeps the compiler from moving what it does with sums across this point.
template <int SUMS>
__device__ __forceinline__ void settle(float (&sums)[SUMS]) {
    #pragma unroll
    for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sums[i])::"memory");
}
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

// Brings sums that are kept in one unit into the next, as follow chooses it.
template <int TILES, int SUMS>
__device__ __forceinline__ void change_unit(float (&sums)[TILES][SUMS], float& unit, float next) {
    if (next == unit) return;
    const float factor = unit * inverse_power(next);
    unit = next;
    #pragma unroll
    for (int t = 0; t < TILES; t++) {
        #pragma unroll
        for (int i = 0; i < SUMS; i++) sums[t][i] *= factor;
        settle(sums[t]);
    }
}

// What stands beyond rows in use may be anything, and zero times it might not be zero.
__device__ __forceinline__ void clear_beyond(unsigned char* chunk, int rows, int thread) {
    for (int i = 8 * rows + thread; i < 8 * ROWS; i += LANES) ((uint4*)chunk)[i] = make_uint4(0, 0, 0, 0);
}

// A program's inputs [SAMPLES, COLUMNS], zero beyond samples, as slices; divided by a unit of their sample.
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
