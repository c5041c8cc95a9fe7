/* What the C files of the library share. */
#ifndef GEARSHIFT_NATIVE_H
#define GEARSHIFT_NATIVE_H

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#endif
