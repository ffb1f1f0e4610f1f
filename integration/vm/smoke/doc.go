// Package smoke has tests for the inside of a guest: that it is the host which the other packages' tests take for granted,
// and that it has what this machine's kernel may lack, kernel WireGuard above all. It has no code of its own;
// integration/vm runs it first in each guest.
package smoke
