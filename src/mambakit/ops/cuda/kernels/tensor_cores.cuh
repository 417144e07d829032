// Tensor cores, and how their operands get into registers.
#pragma once
#include "async_copies.cuh"
#include "numbers.cuh"

// Four matrices of 8 rows of 16 bytes. Lane 8 i + r says where row r of matrix i is, and gets word l % 4 of row l / 4 of each.
__device__ __forceinline__ uint4 read_matrices(const char* row) {
  uint4 words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
  return words;
}

// sums (16 x 8) += A (16 x 16) B (16 x 8). With g = lane / 4 and t = lane % 4, a lane holds words of two neighbours along k: of
// A those at (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), of B at (t, g), (t + 4, g); and the sums at (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], uint4 a, unsigned b0, unsigned b1);
// The same of half the length along k: A (16 x 8) has the words at (g, t) and (g + 8, t), B (8 x 8) that at (t, g).
template <class T> __device__ __forceinline__ void multiply_add(float (&sums)[4], unsigned a0, unsigned a1, unsigned b);
#define MULTIPLY_ADD(T, NAME)                                                                                        \
  template <> __device__ __forceinline__ void multiply_add<T>(float (&sums)[4], uint4 a, unsigned b0, unsigned b1) {   \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                                                 \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                              \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                   \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));                                                   \
  }                                                                                                                    \
  template <> __device__ __forceinline__ void multiply_add<T>(float (&sums)[4], unsigned a0, unsigned a1, unsigned b) { \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                   \
        : "r"(a0), "r"(a1), "r"(b));                                                                                   \
  }
MULTIPLY_ADD(bfloat16, "bf16")
MULTIPLY_ADD(float16, "f16")
#undef MULTIPLY_ADD

// sums (16 x 8) += A (16 x 8) B (8 x 8) of floats, of which tensor cores take the first 11 bits (tf32); the order of elements is
// that of the product of 16 along k, with a float in the place of a word.
__device__ __forceinline__ void multiply_add_floats(float (&sums)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// What they leave out of a float, rounded to as many bits; and a factor that makes up for it on average.
__device__ __forceinline__ float left_out(float v) {
  return __uint_as_float(__float_as_uint(v - __uint_as_float(__float_as_uint(v) & 0xffffe000u)) + 0x1000u);
}
constexpr float LEFT_OUT = 1.0f + 0.72f / 2048;

#ifdef WARPGROUPS
// sums (64 x N) += A (64 x 16) B (N x 16)^T, both in shared memory, with N twice the sums of a thread. It begins now, and ends
// when its group is waited for. Warp w of the warpgroup has rows 16 w to 16 w + 15, as in `multiply_add`, eights of N in turn.
template <class T, int SUMS> __device__ __forceinline__ void multiply_add_warpgroup(float (&sums)[SUMS], uint64 a, uint64 b);
#define FOUR(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_4 FOUR(0)
#define SUMS_8 SUMS_4, FOUR(4)
#define SUMS_12 SUMS_8, FOUR(8)
#define SUMS_16 SUMS_12, FOUR(12)
#define SUMS_20 SUMS_16, FOUR(16)
#define SUMS_24 SUMS_20, FOUR(20)
#define SUMS_28 SUMS_24, FOUR(24)
#define SUMS_32 SUMS_28, FOUR(28)
#define SUMS_36 SUMS_32, FOUR(32)
#define SUMS_40 SUMS_36, FOUR(36)
#define SUMS_44 SUMS_40, FOUR(40)
#define SUMS_48 SUMS_44, FOUR(44)
#define SUMS_52 SUMS_48, FOUR(48)
#define SUMS_56 SUMS_52, FOUR(52)
#define SUMS_60 SUMS_56, FOUR(56)
#define SUMS_64 SUMS_60, FOUR(60)
#define SUMS_68 SUMS_64, FOUR(64)
#define SUMS_72 SUMS_68, FOUR(68)
#define SUMS_76 SUMS_72, FOUR(72)
#define SUMS_80 SUMS_76, FOUR(76)
#define SUMS_84 SUMS_80, FOUR(80)
#define SUMS_88 SUMS_84, FOUR(84)
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_12 NAMES_8 ", %8, %9, %10, %11"
#define NAMES_16 NAMES_12 ", %12, %13, %14, %15"
#define NAMES_20 NAMES_16 ", %16, %17, %18, %19"
#define NAMES_24 NAMES_20 ", %20, %21, %22, %23"
#define NAMES_28 NAMES_24 ", %24, %25, %26, %27"
#define NAMES_32 NAMES_28 ", %28, %29, %30, %31"
#define NAMES_36 NAMES_32 ", %32, %33, %34, %35"
#define NAMES_40 NAMES_36 ", %36, %37, %38, %39"
#define NAMES_44 NAMES_40 ", %40, %41, %42, %43"
#define NAMES_48 NAMES_44 ", %44, %45, %46, %47"
#define NAMES_52 NAMES_48 ", %48, %49, %50, %51"
#define NAMES_56 NAMES_52 ", %52, %53, %54, %55"
#define NAMES_60 NAMES_56 ", %56, %57, %58, %59"
#define NAMES_64 NAMES_60 ", %60, %61, %62, %63"
#define NAMES_68 NAMES_64 ", %64, %65, %66, %67"
#define NAMES_72 NAMES_68 ", %68, %69, %70, %71"
#define NAMES_76 NAMES_72 ", %72, %73, %74, %75"
#define NAMES_80 NAMES_76 ", %76, %77, %78, %79"
#define NAMES_84 NAMES_80 ", %80, %81, %82, %83"
#define NAMES_88 NAMES_84 ", %84, %85, %86, %87"
#define OF_TYPE(T, NAME, N, SUMS, A, B)                                                                               \
  template <> __device__ __forceinline__ void multiply_add_warpgroup<T, SUMS>(float (&sums)[SUMS], uint64 a, uint64 b) { \
    asm volatile("{.reg .pred adds; setp.eq.u32 adds, 0, 0;"                                                           \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" NAMES_##SUMS "}, " A ", " B ", adds, 1, 1, 0, 0;}" \
        : SUMS_##SUMS : "l"(a), "l"(b));                                                                               \
  }
#define MULTIPLY_ADD_WARPGROUP(N, SUMS, A, B) OF_TYPE(bfloat16, "bf16", N, SUMS, A, B) OF_TYPE(float16, "f16", N, SUMS, A, B)
MULTIPLY_ADD_WARPGROUP(8, 4, "%4", "%5")
MULTIPLY_ADD_WARPGROUP(16, 8, "%8", "%9")
MULTIPLY_ADD_WARPGROUP(24, 12, "%12", "%13")
MULTIPLY_ADD_WARPGROUP(32, 16, "%16", "%17")
MULTIPLY_ADD_WARPGROUP(40, 20, "%20", "%21")
MULTIPLY_ADD_WARPGROUP(48, 24, "%24", "%25")
MULTIPLY_ADD_WARPGROUP(56, 28, "%28", "%29")
MULTIPLY_ADD_WARPGROUP(64, 32, "%32", "%33")
MULTIPLY_ADD_WARPGROUP(72, 36, "%36", "%37")
MULTIPLY_ADD_WARPGROUP(80, 40, "%40", "%41")
MULTIPLY_ADD_WARPGROUP(88, 44, "%44", "%45")
MULTIPLY_ADD_WARPGROUP(96, 48, "%48", "%49")
MULTIPLY_ADD_WARPGROUP(104, 52, "%52", "%53")
MULTIPLY_ADD_WARPGROUP(112, 56, "%56", "%57")
MULTIPLY_ADD_WARPGROUP(120, 60, "%60", "%61")
MULTIPLY_ADD_WARPGROUP(128, 64, "%64", "%65")
MULTIPLY_ADD_WARPGROUP(136, 68, "%68", "%69")
MULTIPLY_ADD_WARPGROUP(144, 72, "%72", "%73")
MULTIPLY_ADD_WARPGROUP(152, 76, "%76", "%77")
MULTIPLY_ADD_WARPGROUP(160, 80, "%80", "%81")
MULTIPLY_ADD_WARPGROUP(168, 84, "%84", "%85")
MULTIPLY_ADD_WARPGROUP(176, 88, "%88", "%89")
#undef MULTIPLY_ADD_WARPGROUP
#undef OF_TYPE
#undef FOUR
#endif
