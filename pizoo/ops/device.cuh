// What the kernels of this folder share: halves, barriers in shared memory, powers of two, F00, F11 and F02.
//
// Given by the compiler's command line: BFLOAT16, SAMPLES (of a program, a multiple of 8).

#pragma once

typedef unsigned short half_t;
typedef unsigned int pair_t;  // two halves
typedef unsigned long long barrier_t;

__device__ __forceinline__ pair_t pack(float low, float high) {
    pair_t out;
#if BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#endif
    return out;
}
__device__ __forceinline__ float unpack(half_t x) {
    float out;
#if BFLOAT16
    out = __int_as_float((int)x << 16);
#else
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x));
#endif
    return out;
}
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return (unsigned)__cvta_generic_to_shared(pointer);
}
// Barriers in shared memory: threads arrive, copies of rows report the bytes announced, others wait for the phase to end.
__device__ __forceinline__ void expect(barrier_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(barrier_t* barrier, int bytes = 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(barrier_t* barrier, int phase) {
    asm volatile("{\n.reg .pred done;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}"
                 ::"r"(shared_address(barrier)), "r"(phase & 1) : "memory");
}

// What was written to shared memory before is there for copies and products that read it by themselves after.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The power of two at or below x; x at least 0.
__device__ __forceinline__ float power_of_two(float x) {
    return __int_as_float(__float_as_int(fminf(fmaxf(x, 1e-37f), 1e37f)) & 0x7F800000);
}
__device__ __forceinline__ float root(float x) {
    asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ __forceinline__ float inverse_power(float power) { return __int_as_float(0x7F000000 - __float_as_int(power)); }

// F00, F11 and F02 of a correlation; acos by Abramowitz and Stegun 4.4.46, error 2e-8.
__device__ __forceinline__ void arc_cosine_kernels(float q, float& F00, float& F11, float& F02) {
    q = fminf(fmaxf(q, -1.0f), 1.0f);
    float x = fabsf(q), poly = -0.0012624911f;
    poly = poly * x + 0.0066700901f;
    poly = poly * x - 0.0170881256f;
    poly = poly * x + 0.0308918810f;
    poly = poly * x - 0.0501743046f;
    poly = poly * x + 0.0889789874f;
    poly = poly * x - 0.2145988016f;
    poly = poly * x + 1.5707963050f;
    const float TURNS = 0.15915494309189535f;
    float acos = root(1 - x) * poly * TURNS;
    F11 = q > 0 ? 0.5f - acos : acos;
    F02 = root((1 - x) * (1 + x)) * TURNS;
    F00 = F02 + q * F11;
}

// This program's samples of b. Asked for again where they are needed, not kept: registers are short.
__device__ __forceinline__ int samples_of(int b) { return min(SAMPLES, b - SAMPLES * (int)blockIdx.y); }

// The unit, a power of two, that coefficients of a block are divided by, so that neither tiny multipliers nor tiny rows
// underflow: kept while it is near enough to the largest of them, and no smaller than 2^-40 of the largest so far (top), so that
// sums kept in that unit cannot overflow.
__device__ __forceinline__ void follow(float largest, float& unit, float& top) {
    top = fmaxf(top, largest);
    const float near = power_of_two(fmaxf(largest, top * 9.094947e-13f));
    if (near > 32 * unit || 32 * near < unit) unit = near;
}
