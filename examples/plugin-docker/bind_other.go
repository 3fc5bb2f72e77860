//go:build !linux

package main

import (
	"errors"

	"github.com/bivouac/bivouac/runtime"
	"github.com/moby/moby/api/types/container"
)

func bind(container.InspectResponse, runtime.Spec) error { return errors.ErrUnsupported }

func inside(container.InspectResponse, func(string) error) error { return errors.ErrUnsupported }
