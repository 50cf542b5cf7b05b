/* Which builds of the engine this machine can run, best first. setup.py compiles the same ones, with the flags that are
 * asked for here. */
#pragma GCC visibility push(default)
const char *rednet_builds(void);
int rednet_int8(void);
#pragma GCC visibility pop

const char *rednet_builds(void) {
#if defined(__x86_64__)
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? "avx512 avx2 generic" : avx2 ? "avx2 generic" : "generic";
#else
    return "generic"; /* vectors of four floats: NEON where the compiler targets it */
#endif
}

/* Whether this machine can run the int8 build. */
int rednet_int8(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}
