package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

// bare runs wireguard-go as it is, without Signet: the peer of the benchmarks. The configuration is read from standard
// input in WireGuard's own configuration protocol; the device is left down for the caller to address and set up.
func bare(ctx context.Context, name string) error {
	dev, err := tun.CreateTUN(name, 1420)
	if err != nil {
		return fmt.Errorf("create %s: %w", name, err)
	}
	d := device.NewDevice(dev, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
	defer d.Close()
	if err := d.IpcSetOperation(os.Stdin); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("configure %s: %w", name, err)
	}
	if err := d.Up(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	fmt.Println("bare", strings.TrimSpace(name), "ready")
	<-ctx.Done()
	return nil
}
