/* Looking for an answer without sleeping: a loop of receive calls that mostly find nothing.
 *
 * Why C: in Python each look that finds nothing makes and drops an exception. With this a model's call to another one
 * takes 0.93 of the time (cores awake, medians of 16 paired runs of a script that calls in a loop). Without a C compiler
 * completions.py loops itself.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stdint.h>
#include <sys/socket.h>
#include <time.h>

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static PyObject *glance(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *sock;
    Py_buffer buffer;
    unsigned long long glance_ns;

    if (!PyArg_ParseTuple(arguments, "Ow*K", &sock, &buffer, &glance_ns))
        return NULL;
    /* One that is closed is broken like any other. */
    int fd = PyObject_AsFileDescriptor(sock);
    PyErr_Clear();
    uint64_t looked_ns = now_ns(), last_ns, end_ns = looked_ns + glance_ns;
    Py_ssize_t size;
    Py_BEGIN_ALLOW_THREADS
    do {
        size = recv(fd, buffer.buf, (size_t)buffer.len, MSG_DONTWAIT);
        last_ns = looked_ns;
        looked_ns = now_ns();
    } while (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) && looked_ns < end_ns);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    return Py_BuildValue("nK", size, (unsigned long long)(looked_ns - last_ns));
}

static PyMethodDef functions[] = {
    {"glance", glance, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef glance_loop = {
    PyModuleDef_HEAD_INIT,
    .m_name = "glance_loop",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit_glance_loop(void)
{
    return PyModule_Create(&glance_loop);
}
