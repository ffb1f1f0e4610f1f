// Package version says which build this is.
package version

// Version is set by the linker; a build without the Makefile says "dev".
var Version = "dev"
