/* Descriptors with which environ.c is started: out of the way of those that shells give names to. */
#ifndef ENCLOS_ENVIRON_H
#define ENCLOS_ENVIRON_H

#define ENVIRON_PROGRAM 98
#define ENVIRON_OUTPUT 99

#endif
