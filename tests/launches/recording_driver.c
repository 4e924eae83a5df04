// The stand-in for a CUDA driver, which besides keeps every launch with its arguments.
#include <string.h>

enum { MOST_FUNCTIONS = 4096, MOST_ARGUMENTS = 96, MOST_LAUNCHES = 4096 };

typedef struct {
  unsigned long long function, stream, context;
  unsigned grid[3], block[3], shared, attributes;
  unsigned plain;  // by cuLaunchKernel
  unsigned count;
  unsigned long long arguments[MOST_ARGUMENTS];  // their bytes, and zeros
} Launch;

#define LAUNCHED(config, function, arguments) keep(config, (size_t)(function), arguments)
struct CUlaunchConfig_st;
static void keep(const struct CUlaunchConfig_st *config, size_t function, void **arguments);

#include "stand_in.c"

#include <pthread.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned char sizes[MOST_FUNCTIONS][MOST_ARGUMENTS];
static unsigned counts[MOST_FUNCTIONS];
static Launch launches[MOST_LAUNCHES];
static unsigned launched;

// Says how many bytes each argument of a function has.
void describe(size_t function, unsigned count, const unsigned char *given) {
  counts[function] = count;
  memcpy(sizes[function], given, count);
}

static void keep(const CUlaunchConfig *c, size_t function, void **arguments) {
  pthread_mutex_lock(&lock);
  Launch *l = &launches[launched++ % MOST_LAUNCHES];
  memset(l, 0, sizeof *l);
  *l = (Launch){function, (size_t)c->hStream, (size_t)current_context, {c->gridDimX, c->gridDimY, c->gridDimZ},
                {c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes, c->numAttrs, c->attrs == NULL, counts[function]};
  for (unsigned i = 0; i < l->count; ++i) memcpy(&l->arguments[i], arguments[i], sizes[function][i]);
  pthread_mutex_unlock(&lock);
}

// Hands the launches since the last call out, in order.
unsigned take(Launch *out) {
  unsigned n = launched;
  memcpy(out, launches, n * sizeof *out);
  launched = 0;
  return n;
}

// Makes this the calling thread's context.
void set_context(size_t context) { current_context = (CUcontext)context; }
size_t get_context(void) { return (size_t)current_context; }
