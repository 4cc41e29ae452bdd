# How llama.cpp is compiled, read at each project() of it. Most of the time goes into code that does not compute, and
# into headers that every file reads anew.
if(PROJECT_NAME STREQUAL "ggml") # it computes
    set(CMAKE_C_FLAGS_RELEASE "-O3 -DNDEBUG")
    set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
    return()
endif()

function(join_files)
    set_target_properties(llama-common mtmd server-context llama-server-impl PROPERTIES
        UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
    set(root ${CMAKE_SOURCE_DIR})
    get_target_property(sources llama SOURCES) # it joins only some of its files by itself
    list(TRANSFORM sources PREPEND ${root}/src/ REGEX "^[^/]")
    set_source_files_properties(${sources} DIRECTORY src PROPERTIES SKIP_UNITY_BUILD_INCLUSION OFF)
    # These do not go with others
    set_source_files_properties(${root}/common/json.cpp DIRECTORY common PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    set_source_files_properties(${root}/tools/mtmd/mtmd-helper.cpp ${root}/tools/mtmd/mtmd-helper-gen.cpp
        DIRECTORY tools/mtmd PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
    # These two choose among a vocabulary's 262,144 tokens: with -Og that takes 8 % of the tokens a second
    set_source_files_properties(${root}/src/llama-sampler.cpp DIRECTORY src PROPERTIES
        COMPILE_OPTIONS -O2 SKIP_UNITY_BUILD_INCLUSION ON)
    set_source_files_properties(${root}/common/sampling.cpp DIRECTORY common PROPERTIES
        COMPILE_OPTIONS -O2 SKIP_UNITY_BUILD_INCLUSION ON)
    # Of ggml these read files, find devices, share work among several or train
    set(not_computing gguf.cpp ggml-backend-meta.cpp ggml-backend-reg.cpp ggml-backend-dl.cpp ggml-opt.cpp)
    list(TRANSFORM not_computing PREPEND ${root}/ggml/src/)
    set_source_files_properties(${not_computing} DIRECTORY ggml/src PROPERTIES COMPILE_OPTIONS -Og)
endfunction()
cmake_language(DEFER CALL join_files) # when all its targets are known
