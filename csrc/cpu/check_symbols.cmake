# Fails if an object of one instruction set defines a weak symbol that another one could define too, a template or an
# inline function of the standard library, say. The linker keeps one copy for the whole program, perhaps the one for
# AVX-512, and then a processor without it crashes in code that was compiled for any.
#
# cmake -DNM=nm -DISA=avx2 -DOBJECTS=a.o;b.o -P check_symbols.cmake
execute_process(COMMAND ${NM} --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]* [WVu] [^\n]*" weak "${symbols}")
# Names inside the namespace portlm::<isa> are this instruction set's own; DW.ref.* are addresses, not code.
string(LENGTH ${ISA} length)
list(FILTER weak EXCLUDE REGEX "6portlm${length}${ISA}| DW\\.ref\\.")
list(REMOVE_DUPLICATES weak)
if(weak)
  list(JOIN weak "\n  " lines)
  message(FATAL_ERROR "kernels for ${ISA} define symbols that other instruction sets share:\n  ${lines}\n"
                      "Use a plain array or a function of the kernels' own namespace instead.")
endif()
