/* System calls without a libc, for programs that run in any image (environ.c, command.c). */
#ifndef ENCLOS_NOLIBC_H
#define ENCLOS_NOLIBC_H

#include <asm/unistd.h>

#define AT_FDCWD (-100)

static inline long call(long number, long one, long two, long three, long four)
{
#if defined(__x86_64__)
	register long r10 __asm__("r10") = four;
	long result;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(one), "S"(two), "d"(three), "r"(r10)
			 : "rcx", "r11", "memory");
	return result;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = one;
	register long x1 __asm__("x1") = two;
	register long x2 __asm__("x2") = three;
	register long x3 __asm__("x3") = four;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
#else
#error "no system calls for this machine"
#endif
}

/* Where the kernel begins: hands the stack, which holds the number of arguments and what follows, to begin(). */
#if defined(__x86_64__)
__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n");
#else
__asm__(".globl _start\n_start:\n\tmov x0, sp\n\tbl begin\n");
#endif

__attribute__((used, noreturn)) void begin(long *stack);

#endif
