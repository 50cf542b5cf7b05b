/* Lists the builds that this machine can run, best first. Each check here matches the compiler flags of that build in
 * setup.py. */
#pragma GCC visibility push(default)
const char *rednet_builds(void);
const char *rednet_int8_builds(void);
#pragma GCC visibility pop

#if defined(__x86_64__)
static int avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int avx512(void) {
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const char *rednet_builds(void) { return avx512() ? "avx512 avx2 generic" : avx2() ? "avx2 generic" : "generic"; }

const char *rednet_int8_builds(void) {
    int vnni = avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
    return vnni ? "int8_vnni int8_avx2" : avx2() ? "int8_avx2" : "";
}
#else
/* The compiler turns vectors of four floats into NEON on ARM. */
const char *rednet_builds(void) { return "generic"; }
const char *rednet_int8_builds(void) { return ""; }
#endif
