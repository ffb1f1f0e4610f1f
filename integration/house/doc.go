// Package house keeps the rules about the repository itself: which folder may import which, one importer for each heavy
// dependency, docs on packages and exported names, ceilings on sizes, wrapped errors, docs that name files which exist, and
// no trace of the machine that a change was written on.
//
// Each rule is a function from sources to findings, so that it is tested on small samples (rules_test.go) beside being run
// on the whole tree (house_test.go). A finding names file, line and reason. The tables to edit are at the top of imports.go
// and text.go.
//
// Rules that are kept elsewhere: the layout of structs that C and Go share is compared in bpf, which is the only package
// that can read the object's type information; generated files are compared with a fresh run by "make check-generated".
//
// A ceiling may be broken where the reason stands beside the code:
//
//	//house:allow-long REASON    directly above a function, or above the package clause for a file
//	//house:allow-nowrap REASON  on the line of a fmt.Errorf, or directly above it
package house
