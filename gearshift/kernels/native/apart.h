/* To be included last: clang takes it for all that follows in the file. */
#ifndef GEARSHIFT_APART_H
#define GEARSHIFT_APART_H

/* Of a function whose products and their sum are rounded one by one, as operations on whole tensors round them: compilers
 * may not join them. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#define APART
#elif defined(__GNUC__)
#define APART __attribute__((optimize("fp-contract=off")))
#else
#define APART
#endif

#endif
