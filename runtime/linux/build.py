from cffi import FFI
ffibuilder = FFI()
ffibuilder.cdef("int getpid(void);")
ffibuilder.set_source("enclos.runtime.linux._linux", "#include <unistd.h>")
