// The read-out's output and Jacobian in one pass over its rows, for NVIDIA GPUs from compute capability 9.0.
//
// Computes what pizoo.ops.reference.growing_forward_jacobian says, with w = amult A:
//     partial[program, b, o, :r]    = sum_m F11(q_bm) w_mo B_m
//     partial[program, b, o, r]     = sum_m F00(q_bm) w_mo
//     partial[program, b, o, r + 1] = sum_m F02(q_bm) w_mo   (and 2 columns of padding: lines start at multiples of 16 bytes)
// over this program's rows, q = gbar B^T clamped to [-1, 1].
//
// One program a multiprocessor keeps all 8 x OUTPUTS x r sums in its registers: 8 samples times OUTPUTS make the rows of the
// matrix products. Its warps have two roles. Makers fetch blocks of rows into a ring of STAGES buffers and make each block's
// factors, ahead of the products: correlations, F and weights, 16 rows a warp. Multipliers own a share of the columns each
// and do the products. So memory, arithmetic and tensor cores overlap; few registers of makers leave more to multipliers.
//
// The factor F11 w of a product is made where it is used: with samples and pairs of outputs as the 16 rows of a fragment, a
// thread needs F11 of its own sample and w of its own rows, and multiplies them in pairs.
//
// Weights are scaled by a power of two per 8 rows, so that tiny multipliers or tiny rows do not underflow; sums are kept in a
// power of two near the largest weight of the latest block. No atomics, fixed order: two runs give the same bits.
//
// Given by the compiler's command line: R (a multiple of 8), OUTPUTS, STRIDE_A, STRIDE_B (in elements; rows of B start at
// multiples of 16 bytes), STAGES, SHARED (bytes of shared memory a program gets), BFLOAT16.

#include "device.cuh"

constexpr int MULTIPLIERS = 8, MAKERS = 4;  // warps
constexpr int ROWS = 16 * MAKERS;
constexpr int BUFFERS = 2;  // of factors: makers one block ahead leave two of four stages to rows on their way
constexpr int STEPS = (R + 15) / 16;                               // products of 16 columns that make a correlation
constexpr int TILES = (R / 8 + MULTIPLIERS - 1) / MULTIPLIERS;     // 8 columns each, of a multiplier
constexpr int PAIRS = (OUTPUTS + 1) / 2;                           // of outputs: 16 rows of a fragment
constexpr int LINE = (STEPS * 2 + 1) * 16;                         // bytes between rows: an odd number of 16 meets all banks
constexpr int STAGE = ROWS * LINE;
constexpr int F_LINE = ROWS + 8;                                   // halves; the shift keeps 8 samples on different banks
struct Factors {                                          // of one block of rows
    alignas(16) half_t weights[ROWS / 16][4][8 * PAIRS];  // [16 rows][thread of a quad][output][2 + 2 rows]
    half_t F[3][8][F_LINE];                               // F00, F11, F02 [sample][row]
    float unit[ROWS / 8];                                 // of the weights of 8 rows
};

struct Memory {
    Factors factors[BUFFERS];
    uint2 inputs[STEPS][32];  // of a lane, as fragments
    unsigned long long arrived[STAGES], used[STAGES], made[BUFFERS];  // barriers: of rows, of rows and factors, of factors
    alignas(16) unsigned char ring[STAGES][ROWS][LINE];
};
static_assert(sizeof(Memory) + 256 <= SHARED, "the ring of stages does not fit shared memory");  // a tile may look beyond it
static_assert(8 * OUTPUTS * (R + 4) * 4 <= STAGES * STAGE, "the sums do not fit the ring");

__device__ __forceinline__ pair_t multiply(pair_t a, pair_t b) {
    pair_t out;
#if BFLOAT16
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#endif
    return out;
}
// sums [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void product(float (&sums)[4], pair_t a0, pair_t a1, pair_t a2, pair_t a3, pair_t b0, pair_t b1) {
#if BFLOAT16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Four 8 x 8 matrices of halves; a lane gives the address of one of their 32 lines.
__device__ __forceinline__ void load_matrices(pair_t (&x)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_transposed(pair_t& x, pair_t& y, pair_t& z, pair_t& w, unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x), "=r"(y), "=r"(z), "=r"(w) : "r"(address) : "memory");
}
__device__ __forceinline__ void copy_row(unsigned char* to, const half_t* from, unsigned long long* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "n"(2 * R), "r"(shared_address(barrier)) : "memory");
}

extern "C" __global__ void __launch_bounds__(32 * (MULTIPLIERS + MAKERS), 1)
growing_forward_jacobian(const float* __restrict__ gbar, const half_t* __restrict__ A, const half_t* __restrict__ B,
                         const float* __restrict__ amult, const long long* __restrict__ rows_in_use,
                         float* __restrict__ partial, int M, int b) {
    extern __shared__ __align__(16) unsigned char bytes[];
    Memory& memory = *(Memory*)bytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane % 4;
    const int program = blockIdx.x, programs = gridDim.x, first_sample = 8 * blockIdx.y;

    const int count = rows_in_use ? (int)min(*rows_in_use, (long long)M) : M;
    const int blocks = (count + ROWS - 1) / ROWS;
    const int turns = program < blocks ? (blocks - program + programs - 1) / programs : 0;
    if (!turns) return;

    // Rows beyond the last block's stay as they were, finite, and weigh nothing.
    for (unsigned i = threadIdx.x; i < sizeof(Memory) / 16; i += blockDim.x) ((uint4*)bytes)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    if (threadIdx.x < STAGES) {
        expect(&memory.arrived[threadIdx.x], MAKERS);
        expect(&memory.used[threadIdx.x], MULTIPLIERS);
    } else if (threadIdx.x < STAGES + BUFFERS) {
        expect(&memory.made[threadIdx.x - STAGES], MAKERS);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();

    if (warp >= MULTIPLIERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 104;");
        const int maker = warp - MULTIPLIERS;
        auto first_row = [&](int n) { return (program + (long long)n * programs) * ROWS + 16 * maker; };
        auto fetch = [&](int n) {
            if (n >= turns) return;
            const long long first = first_row(n);
            const int rows = (int)max(0ll, min(16ll, count - first));
            if (lane == 0) arrive(&memory.arrived[n % STAGES], rows * 2 * R);
            __syncwarp();
            if (lane < rows)
                copy_row(memory.ring[n % STAGES][16 * maker + lane], B + (first + lane) * STRIDE_B, &memory.arrived[n % STAGES]);
        };
        // A and multipliers of two rows: loaded a turn ahead, straight from memory. Four lanes share the outputs of a row.
        half_t A_next[2][(OUTPUTS + 3) / 4];
        float amult_next[2];
        auto fetch_weights = [&](int n) {
            #pragma unroll
            for (int group = 0; group < 2; group++) {
                const long long row = first_row(n) + 8 * group + lane / 4;
                const bool used = n < turns && row < count;
                amult_next[group] = used ? amult[row] : 0.0f;
                #pragma unroll
                for (int j = 0; j < (OUTPUTS + 3) / 4; j++) {
                    const int o = 4 * j + quad;
                    A_next[group][j] = used && o < OUTPUTS ? A[row * STRIDE_A + o] : (half_t)0;
                }
            }
        };
        for (int n = 0; n < STAGES; n++) fetch(n);
        fetch_weights(0);
        {
            const int sample = first_sample + lane / 4;
            const float* g = gbar + (long long)sample * R;
            for (int k = maker; k < STEPS; k += MAKERS) {
                const int column = 16 * k + 2 * quad;
                auto at = [&](int j) { return sample < b && column + j < R ? g[column + j] : 0.0f; };
                memory.inputs[k][lane] = make_uint2(pack(at(0), at(1)), pack(at(8), at(9)));
            }
        }
        wait_for_warps<MAKERS>();

        for (int n = 0; n < turns; n++) {
            if (n >= BUFFERS) {
                wait(&memory.used[(n - BUFFERS) % STAGES], (n - BUFFERS) / STAGES);
                fetch(n - BUFFERS + STAGES);
            }
            Factors& f = memory.factors[n % BUFFERS];
            #pragma unroll
            for (int group = 0; group < 2; group++) {
                const int row = 16 * maker + 8 * group + lane / 4;
                float weights[(OUTPUTS + 3) / 4], largest = 0.0f;
                #pragma unroll
                for (int j = 0; j < (OUTPUTS + 3) / 4; j++) {
                    weights[j] = unpack(A_next[group][j]) * amult_next[group];
                    largest = fmaxf(largest, fabsf(weights[j]));
                }
                #pragma unroll
                for (int shift = 16; shift; shift /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, shift));
                const float power = power_of_two(largest), inverse = inverse_power(power);
                half_t* to = &f.weights[maker][row % 8 / 2][2 * group + row % 2];
                #pragma unroll
                for (int j = 0; j < (OUTPUTS + 3) / 4; j++) {
                    const int o = 4 * j + quad;
                    if (o < 2 * PAIRS) to[4 * o] = (half_t)pack(weights[j] * inverse, 0.0f);
                }
                if (lane == 0) f.unit[row / 8] = power;
            }
            fetch_weights(n + 1);

            wait(&memory.arrived[n % STAGES], n / STAGES);
            float q[4][4] = {};
            const unsigned address = shared_address(&memory.ring[n % STAGES][16 * maker + lane % 16][lane / 16 * 16]);
            #pragma unroll
            for (int k = 0; k < STEPS; k++) {
                pair_t rows[4];
                load_matrices(rows, address + k * 32);
                const uint2 g = memory.inputs[k][lane];
                product(q[k % 4], rows[0], rows[1], rows[2], rows[3], g.x, g.y);
            }
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float F[3];
                arc_cosine_kernels(q[0][i] + q[1][i] + q[2][i] + q[3][i], F[0], F[1], F[2]);
                #pragma unroll
                for (int j = 0; j < 3; j++)
                    f.F[j][2 * quad + i % 2][16 * maker + lane / 4 + i / 2 * 8] = (half_t)pack(F[j], 0.0f);
            }
            __syncwarp();
            if (lane == 0) arrive(&memory.made[n % BUFFERS]);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
        const int sample = lane / 4;
        const int first_tile = TILES * warp;  // of 8 columns; those beyond R are multiplied too, and dropped
        float sums[PAIRS][TILES][4] = {}, outputs[2][4] = {}, unit = 1.0f, top = 0.0f;
        for (int n = 0; n < turns; n++) {
            wait(&memory.made[n % BUFFERS], n / BUFFERS);
            wait(&memory.arrived[n % STAGES], n / STAGES);  // the makers have seen them; now they are visible here too
            const Factors& f = memory.factors[n % BUFFERS];
            float largest = 0.0f;
            #pragma unroll
            for (int i = 0; i < ROWS / 8; i++) largest = fmaxf(largest, f.unit[i]);
            // Follow the blocks down to 2^-40 of the largest so far and no further: sums cannot overflow.
            top = fmaxf(top, largest);
            const float next = power_of_two(fmaxf(largest, top * 9.094947e-13f)), inverse = inverse_power(next);
            if (next != unit) {
                const float factor = unit * inverse;
                #pragma unroll
                for (int p = 0; p < PAIRS; p++)
                    #pragma unroll
                    for (int j = 0; j < TILES; j++)
                        #pragma unroll
                        for (int i = 0; i < 4; i++) sums[p][j][i] *= factor;
                #pragma unroll
                for (int i = 0; i < 8; i++) outputs[i / 4][i % 4] *= factor;
                unit = next;
            }
            const unsigned block = shared_address(&memory.ring[n % STAGES][lane % 16][(first_tile + lane / 16) * 16]);
            #pragma unroll
            for (int k = 0; k < ROWS / 16; k++) {
                const float low = f.unit[2 * k] * inverse, high = f.unit[2 * k + 1] * inverse;
                const pair_t low2 = pack(low, low), high2 = pack(high, high);
                auto factor = [&](int i, int half) {
                    return multiply(*(const pair_t*)&f.F[i][sample][16 * k + 8 * half + 2 * quad], half ? high2 : low2);
                };
                const pair_t s0 = factor(1, 0), s1 = factor(1, 1);
                pair_t tiles[TILES + 1][2];
                #pragma unroll
                for (int j = 0; j < TILES; j += 2)
                    load_transposed(tiles[j][0], tiles[j][1], tiles[j + 1][0], tiles[j + 1][1], block + k * 16 * LINE + j * 16);
                const uint4* weights = (const uint4*)f.weights[k][quad];
                #pragma unroll
                for (int p = 0; p < PAIRS; p++) {
                    const uint4 w = weights[p];
                    const pair_t a0 = multiply(s0, w.x), a1 = multiply(s0, w.z), a2 = multiply(s1, w.y), a3 = multiply(s1, w.w);
                    #pragma unroll
                    for (int j = 0; j < TILES; j++)
                        product(sums[p][j], a0, a1, a2, a3, tiles[j][0], tiles[j][1]);
                }
                if (warp == MULTIPLIERS - 1) {
                    const pair_t a0 = factor(0, 0), a1 = factor(2, 0), a2 = factor(0, 1), a3 = factor(2, 1);
                    #pragma unroll
                    for (int j = 0; j < (OUTPUTS + 7) / 8; j++) {
                        const uint2 w = *(const uint2*)&f.weights[k][quad][4 * min(8 * j + sample, 2 * PAIRS - 1)];
                        product(outputs[j], a0, a1, a2, a3, w.x, w.y);
                    }
                }
            }
            __syncwarp();
            if (lane == 0) arrive(&memory.used[n % STAGES]);
        }

        // Through shared memory, so that neighbours are written together.
        wait_for_warps<MULTIPLIERS>();
        float2* to = (float2*)memory.ring + sample * OUTPUTS * (R + 4) / 2;
        #pragma unroll
        for (int p = 0; p < PAIRS; p++)
            #pragma unroll
            for (int j = 0; j < TILES; j++)
                #pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int o = 2 * p + i, column = 8 * (first_tile + j) + 2 * quad;
                    if (o < OUTPUTS && column < R)
                        to[(o * (R + 4) + column) / 2] = make_float2(sums[p][j][2 * i] * unit, sums[p][j][2 * i + 1] * unit);
                }
        if (warp == MULTIPLIERS - 1)
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const int o = 8 * (i / 2) + 2 * quad + i % 2;  // the upper half of the rows is F00, the lower F02
                if (o < OUTPUTS) to[(o * (R + 4) + R) / 2] = make_float2(outputs[i / 2][i % 2] * unit, outputs[i / 2][2 + i % 2] * unit);
            }
        wait_for_warps<MULTIPLIERS>();
        const int size = min(8, b - first_sample) * OUTPUTS * (R + 4) / 4;
        float4* here = (float4*)(partial + ((long long)program * b + first_sample) * OUTPUTS * (R + 4));
        for (int i = threadIdx.x; i < size; i += 32 * MULTIPLIERS) here[i] = ((const float4*)memory.ring)[i];
    }
}
