// Command protoc compiles the plugin protocol and writes its Go code. It runs
// protoc-gen-go and protoc-gen-go-grpc, which this module pins.
//
//	go run . [-descriptors=FILE] PROTOS OUT
//
// PROTOS is the folder that holds v1/runtime.proto, and OUT the folder that gets
// v1/runtime.pb.go and v1/runtime_grpc.pb.go. With -descriptors it also writes
// the compiled protocol to FILE, as released.binpb holds it for each release.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

const source = "v1/runtime.proto"

func main() {
	descriptors := flag.String("descriptors", "", "file to write the compiled protocol to")
	flag.Parse()
	err := errors.New("usage: go run . [-descriptors=FILE] PROTOS OUT")
	if flag.NArg() == 2 {
		err = run(context.Background(), flag.Arg(0), flag.Arg(1), *descriptors)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "protoc:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, protos, out, descriptors string) error {
	files, err := compile(ctx, protos)
	if err != nil {
		return err
	}
	if descriptors != "" {
		data, err := proto.Marshal(&descriptorpb.FileDescriptorSet{File: files})
		if err != nil {
			return err
		}
		if err := os.WriteFile(descriptors, data, 0o644); err != nil {
			return err
		}
	}
	for _, plugin := range []string{"protoc-gen-go", "protoc-gen-go-grpc"} {
		if err := generate(ctx, plugin, files, out); err != nil {
			return fmt.Errorf("%s: %w", plugin, err)
		}
	}
	return nil
}

// compile returns the protocol after the files that it imports.
func compile(ctx context.Context, protos string) ([]*descriptorpb.FileDescriptorProto, error) {
	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{protos}}),
		SourceInfoMode: protocompile.SourceInfoStandard, // the comments
	}
	compiled, err := compiler.Compile(ctx, source)
	if err != nil {
		return nil, err
	}
	var files []*descriptorpb.FileDescriptorProto
	seen := map[string]bool{}
	var add func(protoreflect.FileDescriptor)
	add = func(file protoreflect.FileDescriptor) {
		if seen[file.Path()] {
			return
		}
		seen[file.Path()] = true
		for i := range file.Imports().Len() {
			add(file.Imports().Get(i).FileDescriptor)
		}
		files = append(files, protodesc.ToFileDescriptorProto(file))
	}
	add(compiled[0])
	return files, nil
}

// generate runs a plugin of protoc and writes the files that it answers with.
func generate(ctx context.Context, plugin string, files []*descriptorpb.FileDescriptorProto, out string) error {
	request, err := proto.Marshal(&pluginpb.CodeGeneratorRequest{
		FileToGenerate: []string{source}, Parameter: proto.String("paths=source_relative"), ProtoFile: files,
	})
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "tool", plugin)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(request), os.Stderr
	answer, err := cmd.Output()
	if err != nil {
		return err
	}
	var response pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(answer, &response); err != nil {
		return err
	}
	if response.Error != nil {
		return errors.New(response.GetError())
	}
	for _, file := range response.GetFile() {
		path := filepath.Join(out, file.GetName())
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(file.GetContent()), 0o644); err != nil {
			return err
		}
	}
	return nil
}
