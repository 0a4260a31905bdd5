// What a new compiler and C library would ask of the system under a newer name than manylinux_2_28 has: glibc 2.28 and the
// libstdc++ of GCC 8. Linked into both libraries, where these definitions come before the system's, so that one wheel
// loads on every Linux since 2018 wherever it was made. tests/test_wheel.py reads from the libraries that this holds.
#include <new>
#include <sstream>

#if defined(__GLIBC__)

// These have had a second version since glibc 2.29, which differs in errno alone, and dlsym, which torch's headers call since 2.14,
// since 2.34, when it moved from libdl into libc. The first one is in every glibc.
#if defined(__x86_64__)
#define MEDKD_FIRST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define MEDKD_FIRST_GLIBC "GLIBC_2.17"
#endif
#if defined(MEDKD_FIRST_GLIBC)
#define MEDKD_FIRST(type, name, parameters, arguments)               \
  __asm__(".symver first_" #name ", " #name "@" MEDKD_FIRST_GLIBC); \
  extern "C" type first_##name parameters;                          \
  extern "C" type any_##name parameters __asm__(#name);             \
  extern "C" type any_##name parameters { return first_##name arguments; }
MEDKD_FIRST(double, exp, (double x), (x))
MEDKD_FIRST(double, exp2, (double x), (x))
MEDKD_FIRST(double, log, (double x), (x))
MEDKD_FIRST(double, log2, (double x), (x))
MEDKD_FIRST(double, pow, (double x, double y), (x, y))
MEDKD_FIRST(void*, dlsym, (void* library, const char* name), (library, name))
#endif

// GCC 11 and later asks glibc 2.32 whether there is but one thread, which then counts references without atomics: say no.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;

#endif

#if defined(__GLIBCXX__)

// The default constructors of string streams are in libstdc++ since GCC 9 only; torch's headers call them.
template std::basic_stringstream<char>::basic_stringstream();
template std::basic_ostringstream<char>::basic_ostringstream();

// Called where memory is allocated for more elements than there is address space; in libstdc++ since GCC 11.
namespace std {
__attribute__((__noreturn__)) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

#endif
