// What NVIDIA's static runtime, which the CUDA library holds, asks of the C library. glibc 2.34 moved threads, semaphores and dlopen
// into libc and gave them a second version; linked on such a machine, the runtime would ask for that. Here each name jumps
// to the first version, which is in every glibc since, wherever it lies. See manylinux.cpp, which has dlsym.
#if defined(__GLIBC__) || __has_include(<features.h>)
#include <features.h>
#endif

#if defined(__GLIBC__) && defined(__x86_64__)

#define FIRST(name, version)                                                       \
  __asm__(".symver first_" #name ", " #name "@" version "\n"                       \
          ".text\n.globl " #name "\n.type " #name ", @function\n"                  \
          #name ":\n  jmp *first_" #name "@GOTPCREL(%rip)\n");
#define OLD(name) FIRST(name, "GLIBC_2.2.5")

  OLD(dlclose) OLD(dlerror) OLD(dlopen) OLD(dlvsym) OLD(pthread_condattr_setpshared) OLD(pthread_create)
  OLD(pthread_detach) OLD(pthread_getspecific) OLD(pthread_join) OLD(pthread_key_create) OLD(pthread_key_delete)
  OLD(pthread_kill) OLD(pthread_mutex_trylock) OLD(pthread_mutexattr_destroy) OLD(pthread_mutexattr_init)
  OLD(pthread_mutexattr_setpshared) OLD(pthread_mutexattr_settype) OLD(pthread_once) OLD(pthread_rwlock_destroy)
  OLD(pthread_rwlock_init) OLD(pthread_rwlock_rdlock) OLD(pthread_rwlock_timedrdlock) OLD(pthread_rwlock_timedwrlock)
  OLD(pthread_rwlock_tryrdlock) OLD(pthread_rwlock_trywrlock) OLD(pthread_rwlock_unlock) OLD(pthread_rwlock_wrlock)
  OLD(pthread_rwlockattr_destroy) OLD(pthread_rwlockattr_init) OLD(pthread_rwlockattr_setpshared)
  OLD(pthread_setspecific) OLD(pthread_spin_destroy) OLD(pthread_spin_init) OLD(pthread_spin_lock)
  OLD(pthread_spin_trylock) OLD(pthread_spin_unlock) OLD(sem_destroy) OLD(sem_init) OLD(sem_post) OLD(sem_timedwait)
  OLD(sem_trywait) OLD(sem_wait) OLD(shm_open) OLD(shm_unlink)
  FIRST(dlmopen, "GLIBC_2.3.4")

#endif
